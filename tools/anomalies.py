"""How often anomalies are found that are there, and that are not: real runs, clean and with faults.

Each run trains configs/demo.toml, half as wide, on a selection of the demo's text of its own. Clean
runs count what is noted, which are false alarms. The others have four faults each, at random steps:

    thread     a step in which a thread hangs for 2 s      found: step_seconds, within 8 steps
    disk       20 steps whose data is 50 to 150 ms late     found: data_seconds or step_seconds
    rate       one step at 30 times the learning rate      found: update, loss or norm, within 8
    document   2,000 damaged characters in the text        found: text, loss or norm; its row named

The detectors were tuned on runs of other seeds (clean ones and ones with faults from 1000 to 1009,
with faults from 0 to 15) than those of the table.

python tools/anomalies.py --out docs/observe.md
"""

import argparse
import base64
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_corpus
from demo import texts

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import Config, load_config
from tinyllama.observe.metrics import read_metrics
from tinyllama.system import device, processor
from tinyllama.system.files import atomic_write
from tinyllama.train import trainer as training
from tinyllama.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
STEPS = 320
CHARACTERS = 700_000  # of a run's text: a little more than its steps read
MOST_OF_ONE = 40_000  # characters of a document
SIZES = {
    "model.hidden_size": 128, "model.num_heads": 2, "model.intermediate_size": 384,
    "training.learning_rate": 2.5e-3, "training.max_steps": STEPS, "training.num_epochs": 100,
    "data.val_path": "none", "checkpointing.save_every": 10**6, "observe.sample_prompts": "[]",
}  # fmt: skip
FAULTS = {
    "thread": "a thread that hangs for 2 s",
    "disk": "20 steps whose data is 50 to 150 ms late",
    "rate": "one step at 30 times the learning rate",
    "document": "a damaged document of 2,000 characters",
}
# The steps in which a fault may begin, and how many steps later it must be found.
PLACES = {"thread": (100, 130, 8), "disk": (150, 180, 20), "rate": (230, 280, 8)}
SERIES = {
    "thread": {"step_seconds"},
    "disk": {"data_seconds", "step_seconds"},
    "rate": {"update", "loss", "grad_norm"},
    "document": {"text", "loss", "grad_norm"},
}


def damaged(seed: int, good: str) -> str:
    """2,000 characters as they come from a damaged file; the kind of damage follows the seed."""
    noise = random.Random(seed).randbytes(2000)
    kinds = (
        lambda: "".join(chr(33 + byte % 94) for byte in noise),  # printable noise
        lambda: noise.decode("latin-1"),  # a binary file
        lambda: base64.encodebytes(noise).decode()[:2000],  # an attachment
        lambda: good[:1000].encode("utf-16-le").decode("latin-1"),  # the wrong encoding
    )
    return kinds[seed % len(kinds)]()


def write_text(corpus: Path, file: Path, seed: int, faulty: bool) -> int | None:
    """A random selection of the corpus, with a damaged document in a faulty run; the row of it."""
    rng, row = random.Random(seed), None
    documents = [text[:MOST_OF_ONE] for text in texts(corpus)]
    rng.shuffle(documents)
    chosen: list[str] = []
    while sum(map(len, chosen)) < CHARACTERS and documents:
        chosen.append(documents.pop())
    if faulty:
        row = rng.randrange(len(chosen)) + 1
        chosen.insert(row - 1, damaged(seed, max(chosen, key=len)))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return row


def inject(run: Trainer, seed: int) -> dict[str, int]:
    """Let a thread hang, data come late and a rate be wrong; at which steps."""
    rng = random.Random(seed)
    steps = {name: rng.randrange(first, last) for name, (first, last, _) in PLACES.items()}
    next_batch, train_step = run.batches.next, run.train_step

    def late() -> Any:
        if steps["disk"] <= run.step + 1 < steps["disk"] + 20:
            time.sleep(rng.uniform(0.05, 0.15))
        return next_batch()

    def step(batches: Any, number: int, lr: float, *rest: Any) -> Any:
        if number == steps["thread"]:
            time.sleep(2.0)
        return train_step(batches, number, lr * (30 if number == steps["rate"] else 1), *rest)

    run.batches.next = late  # type: ignore[method-assign]
    run.train_step = step  # type: ignore[assignment]
    return steps


def record(folder: Path, seed: int, faulty: bool) -> dict[str, Any]:
    """Train a run, or read what an earlier one left: its faults, and what was noted."""
    name = f"{'faulty' if faulty else 'clean'}-{seed:04d}"
    kept, text = folder / f"{name}.json", folder / f"{name}.jsonl"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    row = write_text(folder / "train.jsonl", text, seed, faulty)
    run = Trainer(configuration(folder, text, name, seed), show=False)
    training.Progress.notice = lambda self, text: None  # type: ignore[method-assign]
    steps = inject(run, seed) if faulty else {}
    run.run()
    lines = read_metrics(run.folder / "metrics.jsonl")
    notes = [{"step": x["step"], **note} for x in lines for note in x.get("anomalies", ())]
    found = {"steps": steps, "document": f"{text} row {row}", "notes": notes, "made": len(lines)}
    atomic_write(kept, json.dumps(found).encode())
    return found


def configuration(folder: Path, text: Path, name: str, seed: int) -> Config:
    """A small run on `text`, with the tokenizer of all of the corpus."""
    values = SIZES | {
        "data.train_path": text, "data.tokenizer": tokenizer(folder), "training.seed": seed,
        "data.cache_dir": folder / "cache", "checkpointing.checkpoint_dir": folder / name,
    }  # fmt: skip
    changes = [f"{key}={value}" for key, value in values.items()]
    return load_config(str(ROOT / "configs/demo.toml"), changes)


def tokenizer(folder: Path) -> Path:
    """The demo's tokenizer, trained at the first call."""
    made = folder / "tokenizer.model"
    if not made.exists():
        from tinyllama.tokenizers.sentencepiece import train_tokenizer

        train_tokenizer(texts(folder / "train.jsonl"), 4096, made)
    return made


def is_found(fault: str, run: dict[str, Any]) -> bool:
    """Whether a note of a faulty run is that of the fault."""
    notes = [note for note in run["notes"] if note["series"] in SERIES[fault]]
    if fault == "document":  # before the wrong rate, which changes the numbers for a while
        seen = [note for note in notes if note["step"] < run["steps"]["rate"]]
        return any(run["document"] in note.get("documents", ()) for note in seen)
    first, last = run["steps"][fault], run["steps"][fault] + PLACES[fault][2]
    return any(first <= note["step"] <= last for note in notes)


def table(clean: Sequence[dict[str, Any]], faulty: Sequence[dict[str, Any]]) -> str:
    """What was found, as Markdown."""
    series = Counter(note["series"] for run in clean for note in run["notes"])
    alarms, steps = series.total(), sum(run["made"] for run in clean)
    shown = ", ".join(f"{name} {count}" for name, count in series.most_common()) or "none"
    lines = ["| fault | runs | result |", "|---|---|---|"]
    lines.append(
        f"| none | {len(clean)} runs, {steps:,} steps | {alarms} false alarms, "
        f"{1000 * alarms / max(1, steps):.2f} per 1,000 steps ({shown}) |"
    )
    for fault, words in FAULTS.items():
        hits = sum(is_found(fault, run) for run in faulty)
        share = hits / max(1, len(faulty))
        lines.append(f"| {words} | {len(faulty)} | found in {hits}, {share:.0%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clean", type=int, default=10, help="clean runs (default: 10)")
    parser.add_argument("--faulty", type=int, default=20, help="runs with faults (default: 20)")
    parser.add_argument("--first-clean", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--first-faulty", type=int, default=100, help="seed (default: 100)")
    parser.add_argument("--keep", type=Path, help="folder whose runs are not made again")
    parser.add_argument("--out", type=Path, help="Markdown page whose table is written")
    options = parser.parse_args(arguments)
    device.select()
    device.set_threads(1)  # threads of a small model wait for each other, and other programs run
    first_clean, first_faulty = options.first_clean, options.first_faulty
    with tempfile.TemporaryDirectory(prefix="tinyllama-anomalies-") as made:
        folder = options.keep or Path(made)
        folder.mkdir(exist_ok=True)
        if not (folder / "train.jsonl").exists():
            demo_corpus.main([str(folder)])
        clean = [record(folder, first_clean + i, False) for i in range(options.clean)]
        faulty = [record(folder, first_faulty + i, True) for i in range(options.faulty)]
    result = table(clean, faulty)
    print(result)
    if options.out:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        cores = os.cpu_count()
        where = f"Measured on {processor.processor_name()}, {cores} cores, load {load:.0f}."
        page = options.out.read_text(encoding="utf-8")
        before, _, rest = page.partition("<!-- measured -->\n")
        end = "<!-- end of measured -->"
        text = f"{before}<!-- measured -->\n{where}\n\n{result}\n{end}{rest.partition(end)[2]}"
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "anomalies"))
