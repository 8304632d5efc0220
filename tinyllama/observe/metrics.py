"""metrics.jsonl: what a run measures, one object per step.

A report never decides whether training goes on: what a kill or a disk did to the file is mended
when the run is resumed, and said.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from tinyllama.errors import CheckpointError, fit_for_terminal, reason
from tinyllama.system.files import atomic_write, naming_file
from tinyllama.system.untrusted import parse_json

_MOST_LINE_BYTES = 1 << 20


class _Line(msgspec.Struct):
    """What is checked of a line; it may hold more."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    loss: float | msgspec.UnsetType = msgspec.UNSET
    val_loss: float | msgspec.UnsetType = msgspec.UNSET
    lr: float | msgspec.UnsetType = msgspec.UNSET
    tokens_per_second: float | msgspec.UnsetType = msgspec.UNSET


def to_stderr(line: str) -> None:
    """Print a notice."""
    print(fit_for_terminal(line), file=sys.stderr, flush=True)


class MetricsLog:
    """Writes metrics.jsonl of a run; each line is in the file before the next step begins."""

    def __init__(
        self,
        path: Path,
        first_step: int,
        *,
        is_expected: bool = False,
        notice: Callable[[str], None] = to_stderr,
    ) -> None:
        """Open for steps from `first_step` on. Lines of these steps, left by a run that was killed
        after its last checkpoint, are removed; so are damaged lines, and the file that held them is
        kept under another name. `notice` is called with a line about these and about steps that
        are missing; `is_expected` says that the run wrote the file before. Raises OSError."""
        self.path = path
        if is_expected or os.path.lexists(path):
            _mend(path, first_step, notice)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one object. Raises OSError that names the file."""
        with naming_file(self.path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def is_gone(self) -> bool:
        """Whether the file's name no longer leads to it: it, or its folder, was removed."""
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return True

    def reopen(self) -> None:
        """Go on in a new file of that name, whose folder is there."""
        self._file.close()
        self._file = open(self.path, "a", encoding="utf-8")

    def go_back(self, first_step: int) -> None:
        """Drop the lines of steps from `first_step` on; a copy of the file keeps them."""
        self._file.close()
        atomic_write(_free_name(self.path), self.path.read_bytes())
        _mend(self.path, first_step, to_stderr)
        self._file = open(self.path, "a", encoding="utf-8")

    def sync(self) -> None:
        """Wait until every line is on disk. Raises OSError that names the file."""
        with naming_file(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file once everything is on disk."""
        with naming_file(self.path), self._file:
            self.sync()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, without a last line that a kill cut short.

    Raises CheckpointError, which names the file, if it holds something else.
    """
    try:
        with open(path, "rb") as file:
            return [
                _parsed(line, f"{path}: not a metrics file: line {number}")
                for number, line in _whole_lines(file)
                if line.strip()
            ]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error


def _whole_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that have an end, or are too long to be one of ours, with their numbers from 1."""
    number = 1
    while line := file.readline(_MOST_LINE_BYTES):
        is_whole = line.endswith(b"\n")
        if is_whole or len(line) == _MOST_LINE_BYTES:
            yield number, line
        number += is_whole


def _parsed(line: bytes, source: str) -> dict[str, Any]:
    parse_json(line, _Line, CheckpointError, source)
    return parse_json(line, dict[str, Any], CheckpointError, source)


def _mend(path: Path, first_step: int, notice: Callable[[str], None]) -> None:
    """Leave the whole lines of steps before `first_step`, and say what is missing."""
    kept, damaged = [], 0
    if path.exists():
        with naming_file(path), open(path, "rb") as file:
            for _, line in _whole_lines(file):
                try:
                    values = _parsed(line, "") if line.strip() else None
                except CheckpointError:
                    damaged += 1
                    continue
                if values is not None and values["step"] < first_step:
                    kept.append(values)
    if damaged:
        aside = _free_name(path)
        os.rename(path, aside)
        lines = "a line is" if damaged == 1 else f"{damaged} lines are"
        notice(f"{path}: {lines} damaged and left out; the file as it was is now {aside.name}")
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    if lacking := _lacking([line["step"] for line in kept], first_step):
        notice(f"{path}: lacks {lacking}; the run goes on, and its curve has a gap there")


def _lacking(steps: Sequence[int], first_step: int) -> str | None:
    """The first steps between those that are there, and up to `first_step`, that are missing."""
    present = sorted(set(steps) | {first_step})
    present = present if steps else [0, *present]  # a run that came in may begin anywhere
    gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(present) if b > a + 1]
    if not gaps:
        return None
    first, last = gaps[0]
    more = f" and {sum(b - a + 1 for a, b in gaps[1:])} more" if gaps[1:] else ""
    return f"step {first}{more}" if first == last else f"steps {first} to {last}{more}"


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    return aside
