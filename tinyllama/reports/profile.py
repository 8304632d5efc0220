"""Where the time of a step goes: operations and kernels, with the lines that they come from.

    step = data + python until the first kernel + kernels and the gaps between them + python after

A step is a training step (batch, gradients, update), or one token of generation. Two steps run
first: they compile, and touch memory for the first time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllama.config import Config
from tinyllama.data.batches import Batch, Batches, Rows, prepare
from tinyllama.errors import ConfigError, DataError
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.build import build, build_random
from tinyllama.model.counts import aligned
from tinyllama.model.llama import Llama
from tinyllama.model.lora import dropping
from tinyllama.runtime.recording import recording
from tinyllama.runtime.timing import Recorder, Run
from tinyllama.train.micro_batch import plan_run
from tinyllama.train.optimizer import AdamW
from tinyllama.train.prepare import check_files, find_tokenizer, with_base
from tinyllama.train.step import TrainStep

WARM_UP = 2
GAPS, PYTHON, DATA = "launch gaps", "python", "data"
_SHOWN_LINES = 3

Step = Callable[[], float]  # runs a step; returns when its data was there


@dataclass(frozen=True)
class Measured:
    """One step: when it began, when its data was there, when it ended, and its kernels' runs."""

    begin: float
    data_end: float
    end: float
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        """The step's wall time."""
        return self.end - self.begin

    def rest(self) -> dict[str, float]:
        """Seconds outside of kernels, by what they went to."""
        gaps = sum(
            max(0.0, b.begin - a.end) for a, b in zip(self.runs, self.runs[1:], strict=False)
        )
        first = self.runs[0].begin if self.runs else self.end
        last = self.runs[-1].end if self.runs else self.end
        python = max(0.0, first - self.data_end) + max(0.0, self.end - last)
        return {GAPS: gaps, PYTHON: python, DATA: self.data_end - self.begin}


@dataclass(frozen=True)
class Operation:
    """A kernel that comes from the same lines, over all its calls in a step: means of all steps."""

    name: str
    source: tuple[str, ...]  # "tinyllama/model/llama.py:60", the innermost first
    calls: float
    seconds: float
    share: float  # of the step's wall time
    flops: float
    nbytes: float

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations per second."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gb_per_second(self) -> float:
        """Billions of bytes per second, of its buffers, each counted once per call."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """As `tinyllama profile --json` prints it."""
        return {
            "name": self.name,
            "source": list(self.source),
            "calls": self.calls,
            "seconds": self.seconds,
            "share": self.share,
            "gflops": self.gflops,
            "gb_per_second": self.gb_per_second,
        }


@dataclass(frozen=True)
class Profile:
    """The steps that were measured, and what they spent their time on, the hottest first."""

    what: str
    steps: tuple[Measured, ...]
    operations: tuple[Operation, ...]

    @property
    def step_seconds(self) -> float:
        """Mean wall time of a step."""
        return sum(step.seconds for step in self.steps) / len(self.steps)

    def as_dict(self) -> dict[str, Any]:
        """As `tinyllama profile --json` prints it."""
        return {
            "step_seconds": self.step_seconds,
            "operations": [operation.as_dict() for operation in self.operations],
        }

    def table(self) -> str:
        """The operations as text, and what the step's time went to in all."""
        rows = [
            {
                "operation": operation.name[:44],
                "calls": f"{operation.calls:.0f}" if operation.calls else "",
                "ms": f"{1e3 * operation.seconds:.3f}",
                "share": f"{operation.share:.1%}",
                "GFLOPS": f"{operation.gflops:.1f}" if operation.flops else "",
                "GB/s": f"{operation.gb_per_second:.1f}" if operation.nbytes else "",
                "source": _shown(operation.source),
            }
            for operation in self.operations
        ]
        total = sum(operation.share for operation in self.operations)
        return (
            f"{self.what}: {1e3 * self.step_seconds:.2f} ms, mean of {len(self.steps)}\n"
            f"{aligned(rows, left=('source',))}\nin all {total:.1%} of the step"
        )


def profile_training(config: Config, steps: int, say: Callable[[str], None]) -> Profile:
    """Profile training steps of a configuration: of its model, adapters, text and micro-batches.

    Where its training text is not there, tokens and weights are random, which `say` says. Raises
    ConfigError, and what else keeps a run from starting.
    """
    with recording() as recorder:
        config, planned, _ = plan_run(with_base(config))
        t = config.training
        batches, is_random = _batches(config, say)
        model, trained, _ = build_random(config, t.seed) if is_random else build(config)
        optimizer = AdamW(trained, t, copied=list(planned.optimizer.copies))
        train = TrainStep(model, optimizer, t.accumulation_steps, dropping(model, t.seed))
        train.take_over(planned)
        numbers = iter(range(1, WARM_UP + steps + 1))

        def step() -> float:
            parts = micro_batches(batches(), t.micro_batch)
            ready = time.perf_counter()
            train(parts, next(numbers), t.learning_rate)
            return ready

        measured = _measure(step, steps, recorder)
    tokens = f"{t.batch_size} x {config.context_length} tokens, {t.dtype}"
    return summarize(f"a training step of {tokens}", measured)


def profile_generation(model: Llama, prompt: Sequence[int], steps: int) -> Profile:
    """Profile the steps in which a model generates one token each, after `prompt`.

    Raises ConfigError where they do not fit into its context.
    """
    new_tokens = WARM_UP + 1 + steps
    with recording() as recorder:
        generator = Generator(model, len(prompt) + new_tokens)
        tokens = generator.tokens(prompt, new_tokens, Sampling(0.8, None, None, 0))

        def step() -> float:
            begun = time.perf_counter()
            if next(tokens, None) is None:
                raise ConfigError("the model ended its text before all steps were measured")
            return begun

        step()  # reads the prompt
        measured = _measure(step, steps, recorder)
    return summarize(f"a generated token after {len(prompt)}", measured)


def micro_batches(batch: Rows, size: int) -> list[Rows]:
    """The rows of a batch in parts of `size`."""
    make: Callable[..., Rows] = type(batch)
    starts = range(0, len(batch.tokens), size)
    return [make(*(part[i : i + size] for part in batch)) for i in starts]


def summarize(what: str, steps: Sequence[Measured]) -> Profile:
    """The operations of steps, the hottest first, then what went to no kernel."""
    total = sum(step.seconds for step in steps)
    groups: dict[tuple[str, tuple[str, ...]], list[Run]] = {}
    for run in (run for step in steps for run in step.runs):
        name = f"{run.kernel.name} (backward)" if run.kernel.is_backward else run.kernel.name
        groups.setdefault((name, run.kernel.lines), []).append(run)
    operations = [
        _operation(name, lines, runs, total, len(steps)) for (name, lines), runs in groups.items()
    ]
    operations.sort(key=lambda operation: -operation.seconds)
    for name in (GAPS, PYTHON, DATA):
        seconds = sum(step.rest()[name] for step in steps)
        operations.append(Operation(name, (), 0, seconds / len(steps), seconds / total, 0.0, 0.0))
    return Profile(what, tuple(steps), tuple(operations))


def _operation(
    name: str, lines: tuple[str, ...], runs: Sequence[Run], total: float, steps: int
) -> Operation:
    seconds = sum(run.end - run.begin for run in runs)
    flops, nbytes = (sum(getattr(r.kernel, of) for r in runs) for of in ("flops", "nbytes"))
    return Operation(
        name, lines, len(runs) / steps, seconds / steps, seconds / total, flops / steps,
        nbytes / steps,
    )  # fmt: skip


def _measure(step: Step, steps: int, recorder: Recorder) -> list[Measured]:
    for _ in range(WARM_UP):
        step()
    recorder.take()
    measured = []
    for _ in range(steps):
        begin = time.perf_counter()
        ready = step()
        end = time.perf_counter()
        measured.append(Measured(begin, ready, end, tuple(recorder.take())))
    return measured


def _batches(config: Config, say: Callable[[str], None]) -> tuple[Callable[[], Rows], bool]:
    """What makes batches, and whether they are of random tokens."""
    t, context = config.training, config.context_length
    try:
        check_files(config)
    except (ConfigError, DataError) as error:
        say(f"{error}: random tokens and weights are used")
        generator = np.random.default_rng(t.seed)

        def random() -> Rows:
            size = (t.batch_size, context + 1)
            rows = generator.integers(0, config.model.vocab_size, size, np.int32)
            inputs = rows[:, :-1].copy()
            return Batch(inputs, rows[:, 1:].copy(), np.zeros_like(inputs))

        return random, True
    tokenizer = find_tokenizer(config, None, show=False)
    text = prepare(
        config.data.train_path, tokenizer, config.data.cache_dir,
        special_tokens=config.data.special_tokens, progress=False,
    )  # fmt: skip
    return Batches(text, context, t.batch_size, t.seed).next, False


def _shown(lines: Sequence[str]) -> str:
    """The lines of an operation, as many as a table has room for."""
    text = ", ".join(lines[:_SHOWN_LINES])
    more = len(lines) - _SHOWN_LINES
    return f"{text} and {more} more" if more > 0 else text
