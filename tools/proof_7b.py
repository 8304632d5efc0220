"""Prove that a 7B model trains in 8 GiB: real QLoRA steps from random weights, measured.

python tools/proof_7b.py --work /tmp/proof-7b --out docs/proof-7b.md
python tools/proof_7b.py --work /tmp/small --set model.num_layers=3 --steps 2

Writes the weights in shards (13.5 GB of bfloat16), text and a configuration into the folder --work,
trains with `python -m tinyllama.train`, and reports the peak resident memory that the operating
system counted for that process. The weights are removed afterwards, unless --keep is given.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import tokenize
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_corpus import find_names

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import Config, load_config
from tinyllama.errors import TinyllamaError
from tinyllama.model.counts import parameters
from tinyllama.system import device, processor
from tinyllama.system.files import atomic_write
from tinyllama.tokenizers.sentencepiece import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 8 << 30
TEXT_BYTES = 400_000
VOCABULARY = 2000  # of the tokenizer: so little text does not give more pieces


def write_text(work: Path, context: int) -> None:
    """Write a tokenizer and one window of text, both from Python's standard library.

    Every step learns the same window, so that the losses of the steps are comparable.
    """
    library, texts, left = Path(sysconfig.get_path("stdlib")), [], TEXT_BYTES
    for name in find_names(library):
        if left <= 0:
            break
        with tokenize.open(library / name) as file:
            texts.append(file.read())
        left -= len(texts[-1])
    tokenizer = train_tokenizer(texts, VOCABULARY, work / "tokenizer.model")
    ids = tokenizer.encode("".join(texts))
    prefixes = (tokenizer.decode(ids[:length]) for length in range(context, 0, -1))
    # The longest prefix that still fits the window with its begin and end tokens: encoded again, a
    # decoded text may have another length.
    text = next(text for text in prefixes if len(tokenizer.encode(text)) + 2 <= context + 1)
    atomic_write(work / "text.jsonl", (json.dumps({"text": text}) + "\n").encode())


def proof_config(work: Path, options: argparse.Namespace) -> Config:
    """The configuration file's model and adapters, for a few short steps."""
    settings = {
        "model.base": work / "base",
        "training.batch_size": 1,
        "training.max_steps": options.steps,
        "training.num_epochs": options.steps,
        "training.checkpoint_activations": "true",
        "training.learning_rate": options.learning_rate,
        "lr_schedule.type": "constant",
        "lr_schedule.warmup_steps": 0,
        "data.train_path": work / "text.jsonl",
        "data.context_length": options.context,
        "data.tokenizer": work / "tokenizer.model",
        "data.cache_dir": work / "cache",
        "checkpointing.checkpoint_dir": work / "run",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()] + options.set
    config = load_config(options.config, overrides)
    return replace(config, data=replace(config.data, val_path=None))


def train(file: Path) -> tuple[float, int]:
    """Train in a process of its own; returns its seconds and its peak resident bytes."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "tinyllama.train", str(file)]
    child = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise TinyllamaError(f"{' '.join(command)} ended with exit code {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - begun, usage.ru_maxrss * unit


def prove(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write weights and text, train, and return what was measured."""
    config = proof_config(work, options)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        make = [sys.executable, str(ROOT / "tools" / "make_random_model.py"), str(work / "base")]
        sizes = [f"--set={item}" for item in options.set if item.startswith("model.")]
        subprocess.run([*make, "--config", options.config, *sizes], check=True)
    write_text(work, options.context)
    shutil.rmtree(work / "run", ignore_errors=True)
    atomic_write(work / "proof.toml", config.to_toml().encode())
    seconds, peak_bytes = train(work / "proof.toml")
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    losses = [step["loss"] for step in steps]
    counts = parameters(config.model, config.lora)
    return {
        "parameters": counts.base,
        "adapter_parameters": counts.adapters,
        "context_length": options.context,
        "dtype": config.training.dtype,
        "losses": losses,
        "step_seconds": [options.context / step["tokens_per_second"] for step in steps],
        "total_seconds": seconds,
        "peak_memory_bytes": peak_bytes,
        "limit_bytes": LIMIT_BYTES,
        "proved": len(losses) == options.steps
        and all(after < before for before, after in itertools.pairwise(losses))
        and peak_bytes < LIMIT_BYTES,
        "machine": f"{processor.processor_name()}, {device.threads()} threads, "
        f"{device.instruction_set()}, {platform.system()}",
    }


def report(seen: dict[str, Any]) -> str:
    """The result as Markdown."""
    median = sorted(seen["step_seconds"])[len(seen["step_seconds"]) // 2]
    verdict = "under" if seen["peak_memory_bytes"] < seen["limit_bytes"] else "NOT under"
    rows = [
        ("base parameters, int4", f"{seen['parameters']:,}"),
        ("adapter parameters, float32", f"{seen['adapter_parameters']:,}"),
        ("context, activations", f"{seen['context_length']} tokens, {seen['dtype']}"),
        ("peak resident memory", f"{seen['peak_memory_bytes'] / 2**30:.2f} GiB, {verdict} 8 GiB"),
        ("time per step (median)", f"{median:.0f} s"),
        ("total time, loading included", f"{seen['total_seconds']:.0f} s"),
        ("machine", seen["machine"]),
    ]
    losses = " → ".join(f"{loss:.3f}" for loss in seen["losses"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "# QLoRA on 7 billion parameters\n\nPrinted by `make proof-7b` (tools/proof_7b.py). It"
        " trains rank-64 adapters on random weights with the\nsizes of configs/7b.toml, on the same"
        " real text in each step, with activation checkpointing.\n\n"
        f"| what | measured |\n|---|---|\n{table}\n\nLoss per step: {losses}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if the loss fell and memory stayed below the limit, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for 15 GB of files")
    parser.add_argument("--config", default=str(ROOT / "configs" / "7b.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args(arguments)
    work = options.work.absolute()
    try:
        seen = prove(work, options)
    except (TinyllamaError, OSError, subprocess.CalledProcessError) as error:
        print(f"proof_7b: {error}", file=sys.stderr)
        return 2
    finally:
        if not options.keep:
            for name in ("base", "cache", "run"):
                shutil.rmtree(work / name, ignore_errors=True)
    print(json.dumps(seen) if options.json else report(seen))
    if options.out:
        atomic_write(options.out, report(seen).encode())
    return 0 if seen["proved"] else 1


if __name__ == "__main__":
    leave(exit_code(main, "proof_7b"))
