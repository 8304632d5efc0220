"""SmolLM2 learns to write docstrings as a conversation, then to prefer the real ones to its own.

    rows of docstrings.py -> conversations; one in 8 is held out from the fine-tuning, and all those
    of some files from everything
    SFT    `tinyllama train lora` on the rest; merged
    pairs  of rows that SFT never saw: the real docstring, and an answer that the SFT model samples
    DPO    adapters on the merged model, compared with that model itself
    after  loss of the real docstrings, words that sampled answers share with them

python tools/preferences.py --out docs/real-models.md

Everything held out comes from files of which nothing is trained. Exits with code 1 if SFT does not
lower their loss, or DPO does not raise accuracy and margin of their pairs. Every part that is done
leaves a file in --work, so that a run that was stopped goes on behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import docstrings
import smollm2

from docs import placed
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.errors import TinyllamaError
from tinyllama.observe.metrics import read_metrics
from tinyllama.system import device
from tinyllama.system.files import atomic_write
from tinyllama.system.processor import processor_name

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
ASK = "Write the docstring of this Python function.\n\n"
HELD_OUT_EVERY = 8  # rows of train.jsonl; those between are for SFT
CONTEXT, NEW_TOKENS = 160, 96
SETTINGS = {"data.context_length": CONTEXT, "training.eval_first": "true"}
SFT = SETTINGS | {"training.batch_size": 4, "training.learning_rate": 3e-4}
DPO = SETTINGS | {
    "training.objective": "dpo",
    "training.batch_size": 4,
    "training.micro_batch_size": 2,
    "training.learning_rate": 1.5e-4,
    "lr_schedule.warmup_steps": 3,
    "preference.beta": 0.1,
}


class Task:
    """Where everything lies, and how much is trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.gguf: Path = (options.gguf or self.work / smollm2.BASE.name).resolve()
        self.sft_steps: int = options.sft_steps
        self.pairs: int = options.pairs
        self.test: int = options.test
        narrow = any(part in device.instruction_set() for part in ("BF16", "AMX"))
        self.dtype = "bfloat16" if narrow else "float32"

    def file(self, name: str) -> Path:
        """A file or folder of the work folder."""
        return self.work / name

    def run(self) -> dict[str, Any]:
        """Every part that is not done, and what was measured."""
        self._rows()
        sft = self._train("sft", self.gguf, SFT | {
            "data.train_path": self.file("sft.jsonl"), "data.val_path": self.file("test.jsonl"),
            "training.max_steps": self.sft_steps, "training.eval_every": self.sft_steps,
        })  # fmt: skip
        merged = self._merged()
        for name in ("held_out", "test"):
            self._sampled(self.file("sft") / "final", name, "before")
            self._paired(name)
        steps = -(-lines(self.file("held_out-pairs.jsonl")) // int(DPO["training.batch_size"]))
        dpo = self._train("dpo", merged, DPO | {
            "data.train_path": self.file("held_out-pairs.jsonl"),
            "data.val_path": self.file("test-pairs.jsonl"),
            "training.max_steps": steps, "training.eval_every": steps,
        })  # fmt: skip
        after = self._sampled(self.file("dpo") / "final", "test", "after")
        before = [row["rejected"] for row in self._read("test-pairs.jsonl")]
        real = [row["chosen"] for row in self._read("test-pairs.jsonl")]
        return {
            "sft": sft,
            "dpo": dpo,
            "sft_loss": self._loss("sft-loss", merged),
            "dpo_loss": self._loss("dpo-loss", self.file("dpo") / "final"),
            "words_before": shared_words(before, real),
            "words_after": shared_words([row["text"] for row in after], real),
            "dtype": self.dtype,
            "steps": {"sft": self.sft_steps, "dpo": steps},
            "rows": {name: lines(self.file(f"{name}.jsonl")) for name in ("sft", "held_out")},
            "pairs": {n: lines(self.file(f"{n}-pairs.jsonl")) for n in ("held_out", "test")},
        }

    def _rows(self) -> None:
        smollm2.fetch(self.gguf)
        if self.file("test.jsonl").exists():
            return
        docstrings.write_rows(Path(sysconfig.get_path("stdlib")), self.work)
        rows = [*map(conversation, self._read("train.jsonl"))]
        self._write("sft.jsonl", [row for n, row in enumerate(rows) if n % HELD_OUT_EVERY])
        self._write("held_out.jsonl", spread(rows[::HELD_OUT_EVERY], self.pairs))
        self._write("test.jsonl", spread([*map(conversation, self._read("val.jsonl"))], self.test))

    def _train(self, name: str, base: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """A run, continued where it was stopped; the rows that hold its validations."""
        folder = self.file(name)
        if not (folder / "final").exists():
            settings = settings | {
                "model.base": base,
                "training.dtype": self.dtype,
                "data.cache_dir": self.file("cache"),
                "checkpointing.checkpoint_dir": folder,
            }
            words = [word for pair in settings.items() for word in ("--set", "{}={}".format(*pair))]
            words += ["--resume"] * any(folder.glob("step-*"))
            tinyllama("train", "lora", *words)
        metrics = folder / "metrics.jsonl"
        return [row for row in read_metrics(metrics) if "val_loss" in row]

    def _merged(self) -> Path:
        out = self.file("merged")
        if not out.exists():
            adapter = self.file("sft") / "final"
            tinyllama("merge", "--base", self.gguf, "--adapter", adapter, "--out", out)
        return out

    def _sampled(self, model: Path, name: str, when: str) -> list[dict[str, Any]]:
        """An answer of a model to each prompt of some rows."""
        prompts, out = self.file(f"{name}-prompts.jsonl"), self.file(f"{name}-{when}.jsonl")
        if not out.exists():
            rows = self._read(f"{name}.jsonl")
            self._write(prompts.name, [{"messages": row["messages"][:-1]} for row in rows])
            words = ["--prompts", prompts, "--out", out.with_suffix(".part"), "--parallel", 8]
            words += ["--max-new-tokens", NEW_TOKENS, "--temperature", 1, "--seed", 1]
            tinyllama("generate", "--model", model, *words)
            out.with_suffix(".part").rename(out)
        return self._read(out.name)

    def _paired(self, name: str) -> None:
        """The real docstring and the sampled answer to each prompt."""
        if not self.file(f"{name}-pairs.jsonl").exists():
            both = zip(self._read(f"{name}.jsonl"), self._read(f"{name}-before.jsonl"), strict=True)
            self._write(f"{name}-pairs.jsonl", [pair(row, made["text"]) for row, made in both])

    def _loss(self, name: str, model: Path) -> float:
        """The loss of the real docstrings of the test, in nats per token."""
        out = self.file(f"{name}.json")
        if not out.exists():
            words = ["--data", self.file("test.jsonl"), "--context", CONTEXT]
            words += ["--cache-dir", self.file("cache")]
            atomic_write(out, tinyllama("evaluate", "--model", model, *words).encode())
        return float(json.loads(out.read_text())["loss"])

    def _read(self, name: str) -> list[dict[str, Any]]:
        with self.file(name).open(encoding="utf-8", newline="\n") as file:
            return [json.loads(line) for line in file]

    def _write(self, name: str, rows: Iterable[Any]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.file(name), text.encode())


def spread(rows: list[T], count: int) -> list[T]:
    """So many of the rows, at equal distances."""
    return [rows[n * len(rows) // count] for n in range(count)] if count < len(rows) else rows


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of docstrings.py as a question and its answer."""
    signature, quotes, rest = row["text"].partition('    """')
    return {
        "messages": [
            {"role": "user", "content": ASK + signature.strip()},
            {"role": "assistant", "content": (quotes + rest).strip()},
        ]
    }


def pair(row: dict[str, Any], sampled: str) -> dict[str, Any]:
    """The real answer of a conversation, preferred to another one."""
    *prompt, answer = row["messages"]
    return {"prompt": prompt[0]["content"], "chosen": answer["content"], "rejected": sampled}


def shared_words(answers: Sequence[str], real: Sequence[str]) -> float:
    """The mean F1 of the words of each answer against the real one's, from 0 to 1."""
    return mean(
        f1(a.lower().split(), b.lower().split()) for a, b in zip(answers, real, strict=True)
    )


def f1(found: list[str], expected: list[str]) -> float:
    """The harmonic mean of precision and recall of a list of words, each counted as often as it
    occurs."""
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected)) if shared else 0.0


def tinyllama(*words: object) -> str:
    """Run a command of ours as a user does; what it printed."""
    command = [sys.executable, "-m", "tinyllama", *map(str, words)]
    start = time.monotonic()
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(f"{words[0]}: {time.monotonic() - start:.0f} s", flush=True)
    return done.stdout


def lines(path: Path) -> int:
    """Rows of a file."""
    return path.read_bytes().count(b"\n")


def problems(result: dict[str, Any]) -> Iterator[str]:
    """What does not hold."""
    first, last = result["sft"][0], result["sft"][-1]
    if not last["val_loss"] < first["val_loss"]:
        yield f"SFT: held-out loss goes from {first['val_loss']:.4f} to {last['val_loss']:.4f}"
    last = result["dpo"][-1]
    if not (last["val_accuracy"] > 0.5 and last["val_margin"] > 0):
        yield f"DPO: accuracy {last['val_accuracy']:.3f}, margin {last['val_margin']:.3f}"


def report(result: dict[str, Any]) -> str:
    """The part of the page."""
    first, last = result["dpo"][0], result["dpo"][-1]
    losses = result["sft"][0]["val_loss"], result["sft_loss"], result["dpo_loss"]
    return PAGE.format(
        date=time.strftime("%Y-%m-%d"),
        ask=ASK.strip(),
        result=result,
        last=last,
        losses=cells("{:.4f}", *losses),
        accuracies=cells("{:.1%}", first["val_accuracy"], last["val_accuracy"]),
        margins=cells("{:.3f}", first["val_margin"], last["val_margin"]),
        dpo_losses=cells("{:.4f}", first["val_loss"], last["val_loss"]),
        words=cells("{:.3f}", result["words_before"], result["words_after"]),
        machine=f"{processor_name()}, {os.cpu_count()} cores",
        problems="\n".join(f"- {p}" for p in problems(result)) or "Every check holds.",
    )


def cells(form: str, *values: float) -> str:
    """Values as cells of a table."""
    return " |".join(f" {form.format(value)}" for value in values)


NAME = "preferences"
PAGE = """## The same task as conversations, then preferences

Written by `make preferences` on {date} ({machine}).
The user says "{ask}" and the signature, the assistant the
docstring, in the model's own template; only the docstring is trained. Both runs compute in
{result[dtype]}. SFT: LoRA, {result[steps][sft]} steps of 4 rows of 160 tokens, drawn from
{result[rows][sft]} functions. DPO: one epoch, {result[steps][dpo]} steps of 4 pairs, rank 16,
beta 0.1, on {result[pairs][held_out]} functions that SFT did not see; preferred is the real
docstring, rejected what the SFT model itself sampled at temperature 1. All figures are of
{result[pairs][test]} functions of other files, of which neither run saw anything.

| | before SFT | after SFT | after DPO |
|---|--:|--:|--:|
| loss of the real docstring, nats per token |{losses} |
| pairs whose real docstring has the higher reward | |{accuracies} |
| margin of the rewards | |{margins} |
| loss of DPO | |{dpo_losses} |
| words that sampled answers share with the real docstring (F1) | |{words} |

A reward is beta x (log-probability - that of the SFT model), so that all are 0 where DPO begins. At
the end, that of the real docstrings is {last[val_reward_chosen]:.3f} and that of the sampled
answers {last[val_reward_rejected]:.3f}.

{problems}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if a check fails, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file (default: it is downloaded)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".preferences", help="folder to work in"
    )
    parser.add_argument("--sft-steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=80, help="pairs for DPO")
    parser.add_argument("--test", type=int, default=64, help="functions that results are of")
    parser.add_argument("--out", type=Path, help="Markdown page whose part is written")
    options = parser.parse_args(arguments)
    try:
        result = Task(options).run()
    except (TinyllamaError, OSError, subprocess.CalledProcessError) as error:
        print(f"preferences: {error}", file=sys.stderr)
        return 2
    text = report(result)
    print(text)
    if options.out:
        page = placed(options.out.read_text(encoding="utf-8"), NAME, text)
        atomic_write(options.out, page.encode())
    return 1 if [*problems(result)] else 0


if __name__ == "__main__":
    leave(exit_code(main, "preferences"))
