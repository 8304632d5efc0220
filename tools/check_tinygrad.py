"""Measure the pinned tinygrad beside other versions, so that moving on is a decision.

python tools/check_tinygrad.py               the pinned version and the newest
python tools/check_tinygrad.py 0.14.0 0.12.0

Each version gets its own virtual environment, in a folder that is removed at the end, and a process
that trains the same small network on the CPU in plain tinygrad. The processes take turns, so that
other load on the machine affects all of them alike.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
TOKENS, WIDTH, HIDDEN, LAYERS = 256, 256, 768, 2
STEPS, ROUNDS = 3, 5


class Worker:
    """A process that trains with one version of tinygrad, on request."""

    def __init__(self, python: Path) -> None:
        command = [str(python), str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TINYLLAMA_ANY_TINYGRAD": "1"},  # measuring is not refused
        )
        self.version = self._line()

    def tokens_per_second(self) -> float:
        """Train STEPS steps now."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return STEPS * TOKENS / float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("a worker process ended; its own message is printed above")
        return line


def pinned_version() -> str:
    """The version that pyproject.toml pins."""
    match = re.search(r'"tinygrad==([^"]+)"', PYPROJECT.read_text(encoding="utf-8"))
    assert match is not None, "pyproject.toml pins tinygrad"
    return match[1]


def install(version: str, folder: Path) -> Path:
    """A virtual environment with one tinygrad; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    package = "tinygrad" if version == "newest" else f"tinygrad=={version}"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, package], check=True)
    return python


def compare(versions: Sequence[str]) -> None:
    """Print one line per version: median tokens per second, and the ratio to the first version."""
    with tempfile.TemporaryDirectory(prefix="tinygrad-") as folder:
        pythons = [install(v, Path(folder) / str(i)) for i, v in enumerate(versions)]
        workers = [Worker(python) for python in pythons]
        speeds: list[list[float]] = [[] for _ in workers]
        for _ in range(ROUNDS):
            for worker, measured in zip(workers, speeds, strict=True):
                measured.append(worker.tokens_per_second())
        for worker in workers:
            worker.close()
    medians = [statistics.median(measured) for measured in speeds]
    print(f"{'tinygrad':<12}{'tokens/s':>10}{'ratio':>8}{'slowest':>10}{'fastest':>10}")
    for worker, measured, median in zip(workers, speeds, medians, strict=True):
        ratio = median / medians[0]
        extremes = f"{min(measured):>10.0f}{max(measured):>10.0f}"
        print(f"{worker.version:<12}{median:>10.0f}{ratio:>8.2f}{extremes}")


def work() -> None:
    """The worker: prints its version, then trains STEPS steps for each line it reads."""
    from importlib.metadata import version

    step = training_step()
    for _ in range(3):  # plain, captured, replayed
        step().item()
    print(version("tinygrad"), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        for _ in range(STEPS):
            step().item()
        print(time.perf_counter() - begun, flush=True)


def training_step() -> Any:
    """A captured step of gradient descent on a gated network, the matrix products of a LLaMA's
    feed-forward layers: returns the loss."""
    from tinygrad import Tensor, TinyJit

    def weight(rows: int, columns: int) -> Any:
        values = Tensor.rand(rows, columns, device="CPU") - 0.5
        return (values * (2 / columns**0.5)).realize()

    shapes = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * LAYERS
    weights = [weight(*shape) for shape in shapes]
    x = Tensor.rand(TOKENS, WIDTH, device="CPU").realize()

    def step() -> Any:
        h = x
        for gate, up, down in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
            gated = ((h @ gate.T).silu() * (h @ up.T)).contiguous()
            h = (h + gated @ down.T).contiguous()
        loss = (h - x).square().mean()
        grads = loss.gradient(*weights)
        updates = [w.assign(w - 0.01 * g) for w, g in zip(weights, grads, strict=True)]
        Tensor.realize(loss, *updates)
        return loss

    return TinyJit(step)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 if a version cannot be installed or run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=["newest"], help="beside the pinned one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work()
        return 0
    try:
        compare([pinned_version(), *options.versions])
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"check_tinygrad: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
