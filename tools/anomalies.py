"""How often anomalies are found that are there, and that are not: real runs, clean and with faults.

    clean       RUNS runs on Python's own source: what is found there is a false alarm
    document    a file of random bytes in the text        found: a spike of loss or norm, its row
    rate        one step at 30 times the learning rate     found: a spike, or a rise, within 8 steps
    disk        20 steps whose data comes late             found: data_seconds or step_seconds
    thread      a step in which a thread hangs for 2 s     found: step_seconds

python tools/anomalies.py --out docs/observe.md
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import Config, load_config
from tinyllama.observe.metrics import read_metrics
from tinyllama.system import processor
from tinyllama.system.device import select
from tinyllama.train import trainer as training
from tinyllama.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
FAULT_STEP = 150
STEPS_WITH_FAULT = 200
SIZES = {
    "model.vocab_size": 400, "model.hidden_size": 64, "model.num_layers": 2, "model.num_heads": 2,
    "model.intermediate_size": 192, "model.max_seq_len": 256, "data.context_length": 256,
    "lr_schedule.type": "constant",
    "training.learning_rate": 5e-3,
    "data.tokenizer_vocab_size": 400,
    "training.batch_size": 2, "data.val_path": "none", "checkpointing.save_every": 100000,
}  # fmt: skip


@dataclass
class Fault:
    """What is done to a run, and which series must show it, `steps` after it at the latest."""

    name: str
    series: tuple[str, ...]
    inject: Callable[[Trainer, Path], None]
    steps: int = 8


def _late_data(run: Trainer, _: Path) -> None:
    real = run.batches.next

    def next_batch() -> Any:
        if FAULT_STEP <= run.step < FAULT_STEP + 20:
            time.sleep(0.1)
        return real()

    run.batches.next = next_batch  # type: ignore[method-assign]


def _hanging_thread(run: Trainer, _: Path) -> None:
    real = run.train_step

    def step(*arguments: Any) -> Any:
        if run.step == FAULT_STEP:
            time.sleep(2.0)
        return real(*arguments)

    run.train_step = step  # type: ignore[assignment]


def _rate(run: Trainer, _: Path) -> None:
    real = run.train_step

    def step(batches: Any, number: int, lr: float, *rest: Any) -> Any:
        return real(batches, number, lr * 30 if number == FAULT_STEP else lr, *rest)

    run.train_step = step  # type: ignore[assignment]


def _nothing(run: Trainer, _: Path) -> None:
    """The fault is in the text."""


FAULTS = (
    Fault("a corrupt document", ("loss", "grad_norm"), _nothing, 10**9),
    Fault("a spike of the learning rate", ("loss", "grad_norm"), _rate),
    Fault("a slowed disk", ("data_seconds", "step_seconds"), _late_data, 20),
    Fault("a stuck thread", ("step_seconds",), _hanging_thread),
)


def write_text(folder: Path) -> Path:
    """The text: the source of Python's standard library, in rows of at most 4,000 characters."""
    rows = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        rows += [text[at : at + 4000] for at in range(0, len(text), 4000)]
    random.Random(0).shuffle(rows)
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows if row.strip()))
    return file


def corrupted(text: Path, seed: int) -> Path:
    """The same text with a row of random bytes in its middle, as a damaged file has them."""
    rows = text.read_text(encoding="utf-8").splitlines()[:60]
    noise = random.Random(seed)
    row = "".join(chr(noise.randrange(33, 127)) for _ in range(4000))
    rows.insert(30, json.dumps({"text": row}))
    file = text.with_name(f"corrupt-{seed}.jsonl")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def configuration(folder: Path, text: Path, tokenizer: Path, seed: int, steps: int) -> Config:
    """A small run on `text`."""
    values = SIZES | {
        "data.train_path": text, "data.tokenizer": tokenizer, "data.cache_dir": folder / "cache",
        "training.seed": seed, "training.max_steps": steps, "training.num_epochs": 1000,
        "checkpointing.checkpoint_dir": folder / f"{text.stem}-{seed}-{time.monotonic_ns()}",
    }  # fmt: skip
    return load_config(
        str(ROOT / "configs/demo.toml"), [f"{key}={value}" for key, value in values.items()]
    )


def run(config: Config, inject: Callable[[Trainer, Path], None]) -> list[dict[str, Any]]:
    """The lines of metrics of a run, with a fault."""
    trainer = Trainer(config, show=False)
    trainer.watching.notice = lambda line: None
    inject(trainer, trainer.folder)
    training.Progress.notice = lambda self, text: None  # type: ignore[method-assign]
    trainer.run()
    return read_metrics(trainer.folder / "metrics.jsonl")


def found(rows: Sequence[dict[str, Any]], fault: Fault, first: int) -> bool:
    """Whether an anomaly of the fault's series lies at `first`, or up to `fault.steps` after it."""
    return any(
        note["series"] in fault.series
        for row in rows
        if first <= row["step"] <= first + fault.steps
        for note in row.get("anomalies", ())
    )


def found_document(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether an anomaly names row 31, the damaged one."""
    return any(
        document.endswith(" row 31")
        for row in rows
        for note in row.get("anomalies", ())
        for document in note.get("documents", ())
    )


def measure(folder: Path, runs: int, steps: int, tries: int) -> list[str]:
    """The table: one line per kind of run."""
    text = write_text(folder)
    base = configuration(folder, text, Path("train"), 0, 1)
    Trainer(base, show=False).tokenizer  # noqa: B018  (it is trained now, and kept)
    (tokenizer,) = (folder / "cache").glob("tokenizer-*/tokenizer.model")
    lines, alarms, kinds = [], 0, dict[str, int]()
    for seed in range(runs):
        rows = run(configuration(folder, text, tokenizer, seed, steps), _nothing)
        for row in rows:
            for note in row.get("anomalies", ()):
                alarms += 1
                kinds[note["series"]] = kinds.get(note["series"], 0) + 1
        print(f"clean run {seed + 1}/{runs}: {alarms} false alarms so far {kinds}", flush=True)
    total = runs * steps
    shown = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())) or "none"
    lines.append(
        f"| none | {runs} runs of {steps:,} steps | {alarms} false alarms, "
        f"{1000 * alarms / total:.2f} per 1,000 steps ({shown}) |"
    )
    for fault in FAULTS:
        hits = sum(_is_found(folder, text, tokenizer, fault, seed) for seed in range(tries))
        print(f"{fault.name}: {hits} of {tries}", flush=True)
        lines.append(
            f"| {fault.name} | {tries} runs of {STEPS_WITH_FAULT} steps | found in {hits} |"
        )
    return lines


def _is_found(folder: Path, text: Path, tokenizer: Path, fault: Fault, seed: int) -> bool:
    if fault.name == "a corrupt document":
        config = configuration(folder, corrupted(text, seed), tokenizer, seed, STEPS_WITH_FAULT)
        return found_document(run(config, fault.inject))
    config = configuration(folder, text, tokenizer, seed, STEPS_WITH_FAULT)
    return found(run(config, fault.inject), fault, FAULT_STEP)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="clean runs (default: 10)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each (default: 1000)")
    parser.add_argument("--tries", type=int, default=20, help="runs per fault (default: 20)")
    parser.add_argument("--out", type=Path, help="Markdown page whose table is written")
    options = parser.parse_args(arguments)
    select()
    with tempfile.TemporaryDirectory(prefix="tinyllama-anomalies-") as folder:
        lines = measure(Path(folder), options.runs, options.steps, options.tries)
    table = ["| fault | runs | result |", "|---|---|---|", *lines]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    where = f"Measured on {processor.processor_name()}, {os.cpu_count()} cores, load {load:.0f}."
    print("\n".join(table))
    if options.out:
        page = options.out.read_text(encoding="utf-8")
        before, _, rest = page.partition("<!-- measured -->\n")
        end = "<!-- end of measured -->"
        after = rest.partition(end)[2]
        text = f"{before}<!-- measured -->\n{where}\n\n" + "\n".join(table) + f"\n{end}{after}"
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "anomalies"))
