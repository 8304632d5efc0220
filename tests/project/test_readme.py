"""The README's commands run, what it names is there, and its tables are the code's own."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import readme

from tinyllama.config import option_table
from tinyllama.system import device

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# (", smaller" or nothing, "sh" or "python", the lines)
TESTED = re.findall(r"<!-- tested(, smaller)? -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
# What a reader has and we have not: files the README's examples stand for.
EXAMPLES = (".demo/", "checkpoints/", "data/", "path/", "text/", "step-")


# The sizes of the model that the README's first commands train: what `smaller` blocks run with.
SMALLER = """
python() {
  if [[ "$*" == "-m tinyllama.train configs/"* ]]; then
    command python "$@" --set model.num_layers=2 --set model.hidden_size=64 \\
      --set model.num_heads=4 --set model.intermediate_size=128 --set model.vocab_size=512 \\
      --set data.context_length=64 --set training.batch_size=4 --set training.max_steps=2
  else
    command python "$@"
  fi
}
"""


def prepare(folder: Path) -> None:
    """What a reader has: our configurations and tools, and text under the names of the examples."""
    for name in ("configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    texts = {"train.txt": TEXT, "val.txt": TEXT[-3000:]}
    texts |= {f"{Path(name).stem}.jsonl": json.dumps({"text": t}) for name, t in texts.items()}
    for name, text in texts.items():
        for place in ("data", "text"):
            (folder / place).mkdir(exist_ok=True)
            (folder / place / name).write_text(text)


def test_the_readmes_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    """The model that the first one trains stands for the base that others name."""
    assert TEXT.count("<!-- tested") == len(TESTED) >= 6
    prepare(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {k: v for k, v in os.environ.items() if k != "DEV"}  # the README's commands choose
    env |= {"PATH": path, "PYTHONPATH": str(ROOT)}
    for smaller, language, block in TESTED:
        shell = ["bash", "-euo", "pipefail", "-c", (SMALLER if smaller else "") + block]
        if not any(choice.device != "CPU" for choice in device.available()):
            block = block.replace("GPU=1 ", "")  # which would be refused
        done = subprocess.run(
            shell if language == "sh" else [sys.executable, "-c", f"{block}print(logits.shape)"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}{done.stdout[-2000:]}{done.stderr[-4000:]}"
        assert done.stdout.strip(), "a command that shows nothing needs no place in a README"
        base = tmp_path / "path" / "to" / "Llama-2-7b-hf"
        if not base.exists():
            shutil.copytree(tmp_path / "checkpoints" / "tiny" / "final", base)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_option_table_is_the_codes_own() -> None:
    assert option_table().strip() in TEXT


def test_the_published_figures_stand_beside_the_true_ones_and_why() -> None:
    assert readme.published_table() in TEXT


def test_the_generated_parts_are_up_to_date() -> None:
    assert readme.written(TEXT) == TEXT, "run python tools/readme.py"


def test_a_table_that_differs_is_found() -> None:
    altered = TEXT.replace("`training.learning_rate` | `0.0003`", "`training.learning_rate` | `1`")
    assert altered != TEXT
    assert readme.written(altered) == TEXT


def test_the_file_list_names_every_file_once() -> None:
    package = ROOT / "tinyllama"
    names = [name for line in readme.THE_WAY.values() for name in line.split()]
    listed = [path for name in names for path in readme.files_of(name)]
    assert sorted(listed) == sorted(package.rglob("*.py"))


def test_files_named_exist() -> None:
    named = set(re.findall(r"(?<![\w/.-])[\w.-]*\w/[\w./-]*\.\w+", TEXT))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link}
    ours = {name for name in named if not name.startswith(EXAMPLES)}
    assert len(ours) > 20
    assert [name for name in sorted(ours) if not (ROOT / name).exists()] == []


def test_commands_named_exist() -> None:
    modules = set(re.findall(r"python -m (tinyllama[.\w]*)", TEXT))
    assert {"tinyllama.train", "tinyllama.evaluate", "tinyllama.generate"} <= modules
    assert [m for m in sorted(modules) if importlib.util.find_spec(m) is None] == []
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z0-9-]+)", SHELL)) | set(re.findall(r"`make ([\w-]+)", TEXT))
    assert {"demo", "test"} <= named <= targets


def test_options_named_in_commands_exist() -> None:
    keys = set(re.findall(r"--set (\w+\.\w+)=", SHELL))
    assert len(keys) > 5
    assert [key for key in sorted(keys) if f"| `{key}` |" not in option_table()] == []


def test_the_list_of_make_targets_is_makes_own() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in TEXT
