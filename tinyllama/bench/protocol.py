"""Messages between the benchmark and its worker processes: one JSON object per line.

    runner -> worker   the Spec                    worker -> runner   {"ready": {...}}
    runner -> worker   {"step": i}                 worker -> runner   {"loss", "seconds", ...}

Needs numpy only: a worker may run in an interpreter that has PyTorch and not tinygrad.
The clock around a step is here, so that every contender is timed by the same code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from tinyllama.errors import TinyllamaError
from tinyllama.system.memory import resident_bytes


@dataclasses.dataclass(frozen=True)
class Spec:
    """One benchmark, as every contender receives it."""

    model: dict[str, Any]  # Hugging Face config names
    training: dict[str, Any]  # the [training] section
    batch: int  # rows per step
    context: int  # tokens per row
    dtype: str  # float32, bfloat16 or float16
    device: str  # ours, by tinygrad's name: CPU, CUDA, ...
    threads: int
    seed: int
    data: str  # .npy file, int32 (steps, batch, context + 1)
    lora: dict[str, Any] | None  # the [lora] section
    config: str  # the whole resolved configuration, as TOML
    compile: bool = False  # torch.compile the peer

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Spec:
        return cls(**json.loads(line))


class Step(NamedTuple):
    """A contender's report of one training step; None for what it cannot measure."""

    loss: float
    kernels: int | None = None
    flops_executed: int | None = None
    device_bytes: int | None = None  # memory in use on a device other than the processor


class Contender(Protocol):
    """A model with its optimizer, ready to train."""

    def describe(self) -> dict[str, Any]:
        """What it is: at least parameters (a count), library and device."""

    def step(self, tokens: NDArray[np.int32]) -> Step:
        """Train once on `tokens` (batch, context + 1); return when the loss is known."""


def serve(build: Callable[[Spec], Contender]) -> int:
    """Run a worker: read a Spec, then steps, until the input ends. Returns the exit code."""
    # Other output must not mix with the JSON lines: it goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        spec = Spec.from_json(sys.stdin.readline())
        contender = build(spec)
        _send(answers, {"ready": contender.describe()})
        _answer_steps(contender, np.load(spec.data, mmap_mode="r"), answers)
    except TinyllamaError as error:
        _send(answers, {"error": str(error)})
        return 2
    except Exception as error:
        # The process ends here: the runner turns this into one line for the user.
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        raise
    return 0


def _answer_steps(contender: Contender, batches: NDArray[np.int32], answers: TextIO) -> None:
    for line in sys.stdin:
        tokens = np.ascontiguousarray(batches[json.loads(line)["step"] % len(batches)])
        start = time.perf_counter()
        step = contender.step(tokens)
        seconds = time.perf_counter() - start
        answer = step._asdict()
        peak = answer.pop("device_bytes") or resident_bytes(peak=True)
        _send(answers, {**answer, "seconds": seconds, "memory_peak_bytes": peak})


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
