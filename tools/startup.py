"""Measure the time to the first loss: warm and cold kernel caches, memory ready or not.

    first loss - one steady step, of new processes that train configs/124m.toml on 1 x 512 tokens

Touching memory for the first time may cost seconds per GB in a virtual machine whose host has to
provide it. So everything is measured twice: without preparation, and after another process has
allocated and freed as much memory as the run will need.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from tinyllama.bench import machine, text
from tinyllama.bench.benchmark import make_spec, parser, resolve
from tinyllama.bench.protocol import Spec
from tinyllama.bench.runner import (
    WARM_UP_STEPS,
    contenders,
    race,
    summarise,
)
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system import device

BENCH = "configs/124m.toml --batch 1 --context 512 --steps 3"
# Allocates that many GB, touches every page, and exits.
TAKE = "import numpy, sys; numpy.empty(int(sys.argv[1]) << 30, numpy.uint8)[::4096] = 1"


def main(arguments: Sequence[str] | None = None) -> int:
    command_line = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    command_line.add_argument("--runs", type=int, default=3, help="processes of each kind")
    command_line.add_argument(
        "--gigabytes", type=int, default=5, help="memory to allocate and free before a run"
    )
    command_line.add_argument("--bench", default=BENCH, help="arguments of `tinyllama bench`")
    command_line.add_argument("--out", type=Path, help="also write the table to this file")
    options = command_line.parse_args(arguments)
    device.select()
    lines = ["| kernel caches | memory | first loss, s | second step, s |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        spec, steps = prepared(options.bench, Path(folder) / "tokens.npy")
        measured(spec, steps, warm)  # fills the cache
        for caches in ("warm", "cold"):
            for taken in dict.fromkeys((options.gigabytes, 0)):
                measurements = []
                for number in range(options.runs):
                    cache = warm if caches == "warm" else Path(folder) / f"{taken} {number}"
                    measurements.append(measured(spec, steps, cache, taken))
                lines.append(row(caches, taken, measurements))
                print(lines[-1], flush=True)
    summary = (
        f"Seconds beyond a steady step of {measurements[-1]['step_seconds']:.1f} s; median and"
        f" range of {options.runs} runs.\n`{options.bench}`, by `tools/startup.py`,"
        f" {time.strftime('%Y-%m-%d')}."
    )
    report = "\n".join([*lines, "", summary, f"{machine.line(machine.describe(spec.threads))}."])
    print(f"\n{report}")
    if options.out is not None:
        options.out.write_text(f"# Time to the first loss\n\n{report}\n", encoding="utf-8")
    return 0


def prepared(words: str, data_file: Path) -> tuple[Spec, int]:
    """The benchmark's request to its worker, with tokens written to a file, and its steps."""
    options = parser().parse_args(words.split())
    config = resolve(options)
    count, batch = WARM_UP_STEPS + options.steps, config.training.micro_batch
    np.save(data_file, text.batches(config, count, batch, config.context_length)[0])
    return make_spec(config, options, data_file), options.steps


def measured(spec: Spec, steps: int, cache: Path, taken: int = 0) -> dict[str, Any]:
    """The benchmark's result for one new process that keeps compiled kernels in `cache`."""
    if taken:
        subprocess.run([sys.executable, "-c", TAKE, str(taken)], check=True)
    os.environ["TINYLLAMA_KERNEL_CACHE"] = str(cache)
    commands = contenders(None, None)
    (worker,) = race(commands, dict.fromkeys(commands, spec), steps)
    return summarise(worker, spec, 1)


def row(caches: str, taken: int, measurements: Sequence[dict[str, Any]]) -> str:
    """One row of the table: medians of the time beyond a steady step, and their range."""
    first = [f["first_loss_seconds"] - f["step_seconds"] for f in measurements]
    second = [f["second_step_seconds"] - f["step_seconds"] for f in measurements]
    memory = f"{taken} GB allocated and freed before" if taken else "not prepared"
    shown = f"{statistics.median(first):.1f} ({min(first):.1f} to {max(first):.1f})"
    return f"| {caches} | {memory} | {shown} | {statistics.median(second):.1f} |"


if __name__ == "__main__":
    leave(exit_code(main, "startup"))
