"""Runs the contenders' steps in turn (A B A B ...) and takes medians.

In turn, because the speed of a shared machine drifts: both steps of a pair ran under the same
conditions, so the ratio is the median over pairs and not the ratio of medians.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tinyllama.bench.protocol import Spec
from tinyllama.errors import TrainingError, reason

WARM_UP_STEPS = 2  # the first builds and compiles, the second captures the step's graph
# The package's own __init__ is skipped, since an interpreter that has PyTorch may lack what it
# imports. Our path goes last, so that such an interpreter prefers its own packages.
BOOTSTRAP = """
import runpy, sys, types
package = types.ModuleType("tinyllama")
package.__path__ = [{root!r} + "/tinyllama"]
sys.modules["tinyllama"] = package
sys.path.append({root!r})
runpy.run_module({module!r}, None, "__main__")
"""


def worker_command(python: str, module: str) -> list[str]:
    """The command that runs `module` of this package in the interpreter `python`."""
    root = str(Path(__file__).resolve().parents[2])
    return [python, "-c", BOOTSTRAP.format(root=root, module=module)]


@dataclasses.dataclass
class Answer:
    """One training step of one contender."""

    loss: float
    seconds: float
    kernels: int | None
    flops_executed: int | None
    memory_peak_bytes: int


class Worker:
    """A contender in a process of its own. Raises TrainingError with the last line it printed."""

    def __init__(self, name: str, command: Sequence[str], spec: Spec) -> None:
        self.name = name
        self.answers: list[Answer] = []
        self.first_loss_seconds = 0.0
        self.started = time.perf_counter()
        self.errors = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        except OSError as error:
            self.errors.close()
            raise TrainingError(f"{name}: cannot start {command[0]}: {reason(error)}") from error
        self.ready: dict[str, Any] = self._request(spec.to_json())["ready"]

    def step(self, index: int) -> Answer:
        """Train on batch `index`."""
        answer = Answer(**self._request(json.dumps({"step": index})))
        if not self.answers:
            self.first_loss_seconds = time.perf_counter() - self.started
        self.answers.append(answer)
        return answer

    def close(self) -> None:
        """End the process, which stops at the end of its input."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise self._failed(self._last_line())
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, cause: str) -> TrainingError:
        self.process.kill()
        self.close()
        return TrainingError(f"benchmark worker {self.name!r}: {cause}")

    def _last_line(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        killed = " (killed: out of memory?)" if code == -9 else ""
        return f"ended with exit code {code}{killed}: {lines[-1] if lines else 'no message'}"


def race(
    commands: Mapping[str, Sequence[str]],
    specs: Mapping[str, Spec],
    steps: int,
    on_step: Callable[[str, int, Answer], None] = lambda name, index, answer: None,
) -> list[Worker]:
    """Warm each contender up, then step all in turn `steps` times. Returns the closed workers.

    A contender takes its first step before the next one starts, so that the seconds to its first
    loss are its own.
    """
    workers: list[Worker] = []
    try:
        for name, command in commands.items():
            workers.append(Worker(name, command, specs[name]))
            on_step(name, 0, workers[-1].step(0))
        for index in range(1, WARM_UP_STEPS + steps):
            for worker in workers:
                on_step(worker.name, index, worker.step(index))
    finally:
        for worker in workers:
            worker.close()
    return workers


def summarise(worker: Worker, spec: Spec, model_flops: int) -> dict[str, Any]:
    """The medians of one contender's steps after the warm-up."""
    timed = worker.answers[WARM_UP_STEPS:]
    seconds = statistics.median(answer.seconds for answer in timed)
    last = timed[-1]
    executed = last.flops_executed
    return {
        **worker.ready,
        "tokens_per_second": spec.batch * spec.context / seconds,
        "step_seconds": seconds,
        "step_seconds_min": min(answer.seconds for answer in timed),
        "step_seconds_max": max(answer.seconds for answer in timed),
        "first_loss_seconds": worker.first_loss_seconds,
        "second_step_seconds": worker.answers[1].seconds,
        "peak_memory_bytes": last.memory_peak_bytes,
        "flops_per_second": model_flops / seconds,
        "flops_ratio": None if executed is None else executed / model_flops,
        "kernels_per_step": last.kernels,
        "first_loss": worker.answers[0].loss,
        "last_loss": last.loss,
    }


def speed_ratio(ours: Worker, peer: Worker) -> float:
    """How many times as fast ours is: the median over pairs of neighbouring steps."""
    pairs = zip(ours.answers[WARM_UP_STEPS:], peer.answers[WARM_UP_STEPS:], strict=True)
    return statistics.median(theirs.seconds / own.seconds for own, theirs in pairs)


def contenders(peer: str | None, peer_python: str | None) -> dict[str, list[str]]:
    """Contender's name -> its worker's command; ours first."""
    commands = {"tinyllama": worker_command(sys.executable, "tinyllama.bench.worker_tinyllama")}
    if peer == "lora":
        commands["peer"] = commands["tinyllama"]
    elif peer is not None:
        python = peer_python or sys.executable
        commands["peer"] = worker_command(python, "tinyllama.bench.worker_torch")
    return commands
