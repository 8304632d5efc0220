"""The demo: learn Python from the source of Python's own standard library, then show what came out.

    corpus -> train configs/demo.toml -> held-out bits per byte, beside gzip -9 -> curve -> sample

python tools/demo.py --budget 300      everything it writes lies in .demo/
"""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_corpus

from tinyllama.cli.arguments import exit_code, leave, seconds
from tinyllama.observe.metrics import read_metrics
from tinyllama.reports import plot

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/demo.toml"
DEMO = Path(".demo")
RUN = DEMO / "run"
MODEL = RUN / "final"
HELD_OUT = DEMO / "val.jsonl"
# Validation during training costs time from the budget, so it reads one PART-th of each held-out
# file; the result at the end is that of all of them.
PART = 12
PROMPT = "def "


class Stopped(Exception):
    """A step failed or was stopped; we exit with its exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=seconds, default=300, help="seconds of training")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)  # the configuration's paths start there
    try:
        run_demo(options.budget)
    except Stopped as stopped:
        return int(stopped.args[0])
    return 0


def run_demo(budget_seconds: float) -> None:
    """All steps, from text to sample."""
    say("1. The text: the source of Python's standard library, 1 file in 20 held out")
    if demo_corpus.main([str(DEMO)]) != 0:
        raise Stopped(2)
    part = DEMO / "val_part.jsonl"
    write_part(HELD_OUT, part)
    shutil.rmtree(RUN, ignore_errors=True)

    say(f"2. Training {CONFIG} for {budget_seconds:g} seconds")
    tinyllama("train", CONFIG, "--budget", f"{budget_seconds:g}", "--set", f"data.val_path={part}")
    if not MODEL.exists():
        raise Stopped(130)  # stopped by Ctrl-C: the run itself prints how to continue

    say("3. Held-out text: every token of it, predicted once")
    cache = ["--cache-dir", str(DEMO / "cache"), "--batch", "8"]
    # With this stride each token has at least half a window of text before it, or all of its file.
    words = ["evaluate", "--model", str(MODEL), "--data", str(HELD_OUT), "--stride", "128", *cache]
    evaluation = json.loads(tinyllama(*words, capture=True))
    gzip_bits = gzip_bits_per_byte(HELD_OUT)
    draw_curve(evaluation, gzip_bits)

    say(f"4. A sample that begins with {PROMPT!r}")
    words = ["generate", "--model", str(MODEL), "--prompt", PROMPT, "--temperature", "0.8"]
    tinyllama(*words, "--max-new-tokens", "120")

    say("5. The result, in bits per byte of held-out text (less is better)")
    report(evaluation["bits_per_byte"], gzip_bits, max(300, 2 * budget_seconds))

    say("6. The run as a page: open it in a browser")
    tinyllama("report", str(RUN), "--out", str(DEMO / "report.html"))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def tinyllama(*words: str, capture: bool = False) -> str:
    """Run a tinyllama command in its own process; returns what it printed, if captured."""
    # Ctrl-C reaches the child too, which saves its state; we wait for it to finish.
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tinyllama", *words],
            stdout=subprocess.PIPE if capture else None, text=True, check=False,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, previous)
    if done.returncode != 0:
        raise Stopped(done.returncode if done.returncode > 0 else 1)
    return done.stdout or ""


def texts(path: Path) -> list[str]:
    """The text of each row of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write_part(held_out: Path, part: Path) -> None:
    """Write one PART-th of each held-out text, from its middle, one row per text."""
    with open(part, "w", encoding="utf-8") as file:
        for text in texts(held_out):
            length = max(1, len(text) // PART)
            begin = (len(text) - length) // 2
            file.write(json.dumps({"text": text[begin : begin + length]}) + "\n")


def gzip_bits_per_byte(held_out: Path) -> float:
    """gzip -9's bits per byte for all held-out files as one stream, which it packs tighter than
    the files one by one."""
    data = "".join(texts(held_out)).encode()
    return 8 * len(gzip.compress(data, compresslevel=9)) / len(data)


def draw_curve(evaluation: dict[str, Any], gzip_bits: float) -> None:
    """.demo/loss.png: the run's loss, with gzip's as a line."""
    per_nat = evaluation["bits_per_byte"] / evaluation["loss"]
    reference = plot.Reference("gzip -9", gzip_bits, per_nat)
    rows = read_metrics(RUN / "metrics.jsonl")
    title = f"configs/demo.toml: {evaluation['bits_per_byte']:.2f} bits per byte of held-out text"
    plot.draw(rows, DEMO / "loss.png", title, reference)


def report(bits: float, gzip_bits: float, more: float) -> None:
    """Print the result, a larger budget to try if gzip is ahead, and where the files are."""
    print(f"this model       {bits:.3f}")
    print(f"gzip -9          {gzip_bits:.3f}   (all held-out files as one stream)")
    if bits < gzip_bits:
        print(f"The model beats gzip: {100 * (1 - bits / gzip_bits):.0f} % fewer bits.")
    else:
        print(f"gzip is ahead: the model needs more time, e.g. make demo BUDGET={more:g}.")
    print(f"loss curve       {DEMO / 'loss.png'}")
    print(f"model            {MODEL} (a Hugging Face folder)")


if __name__ == "__main__":
    leave(exit_code(main, "demo"))
