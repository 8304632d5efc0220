"""metrics.jsonl: what a run measures, one object per step.

A report never decides whether training goes on: what a kill or a disk did to the file is mended
when the run is resumed, and said.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from tinyllama.errors import CheckpointError, reason
from tinyllama.system.files import (
    append_regular,
    atomic_write,
    free_name,
    is_regular,
    naming_file,
    open_regular,
)
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import parse_json

_MOST_LINE_BYTES = 1 << 20


class _Line(msgspec.Struct):
    """What is checked of a line; it may hold more."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    loss: float | msgspec.UnsetType = msgspec.UNSET
    val_loss: float | msgspec.UnsetType = msgspec.UNSET
    lr: float | msgspec.UnsetType = msgspec.UNSET
    tokens_per_second: float | msgspec.UnsetType = msgspec.UNSET


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
        self._file = append_regular(path)

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
        self._file = append_regular(self.path)

    def go_back(self, first_step: int) -> None:
        """Drop the lines of steps from `first_step` on; a copy of the file keeps them."""
        self._file.close()
        atomic_write(free_name(self.path), self.path.read_bytes())
        _mend(self.path, first_step, to_stderr)
        self._file = append_regular(self.path)

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
        with open_regular(path, links=False) as file:
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
    if not line.endswith(b"\n"):
        raise CheckpointError(f"{source}: longer than {_MOST_LINE_BYTES} bytes")
    parse_json(line, _Line, CheckpointError, source)
    return parse_json(line, dict[str, Any], CheckpointError, source)


def _mend(path: Path, first_step: int, notice: Callable[[str], None]) -> None:
    """Leave the last whole line of each step before `first_step`, in their order, and say what is
    missing."""
    kept, damaged, wrong = dict[int, bytes](), 0, None
    if is_regular(path):
        with naming_file(path), open_regular(path, links=False) as file:
            for _, line in _whole_lines(file):
                try:
                    step = _parsed(line, "")["step"] if line.strip() else first_step
                except CheckpointError:
                    damaged += 1
                    continue
                if step < first_step:
                    kept[step] = line
    elif os.path.lexists(path):
        wrong = "is a link, a folder or a pipe, so a new file is begun"
    if damaged:
        lines = "a line is" if damaged == 1 else f"{damaged} lines are"
        wrong = f"{lines} damaged and left out"
    if wrong is not None:
        aside = free_name(path)
        os.rename(path, aside)
        notice(f"{path}: {wrong}; the file as it was is now {aside.name}")
    atomic_write(path, b"".join(kept[step] for step in sorted(kept)), links=False)
    if lacking := _lacking([*kept], first_step):
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
