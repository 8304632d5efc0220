"""samples.jsonl of a run: what its model wrote after so many steps, one object per line."""

import io
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from tinyllama.errors import CheckpointError, reason
from tinyllama.system.files import atomic_write, free_name, read_file
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import parse_json

SAMPLES = "samples.jsonl"
_MOST_BYTES = 32 << 20
_MOST_SHOWN = 1000  # of the newest


class Sample(msgspec.Struct):
    """What a model wrote after so many steps."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    prompt: str
    text: str


def read_samples(folder: Path) -> list[Sample]:
    """The last samples of a run's folder, without a last line that a kill cut short; none without a
    file. Raises CheckpointError."""
    path = folder / SAMPLES
    source = f"{path}: not a file of samples"
    try:
        parsed = (parse_json(line, Sample, CheckpointError, source) for line in _lines(path))
        return [*deque(parsed, _MOST_SHOWN)]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error


def forget_after(folder: Path, step: int) -> None:
    """Remove the samples of later steps, which a run that goes back writes again.

    What a disk did to the file does not keep a run from going on: damaged lines are left out, and
    the file that held them gets another name, which standard error says. Raises OSError.
    """
    path = folder / SAMPLES
    if not os.path.lexists(path):
        return
    kept, wrong = bytearray(), None
    try:
        for line in _lines(path):
            try:
                is_kept = parse_json(line, Sample, CheckpointError, "").step <= step
            except CheckpointError:
                wrong, is_kept = "damaged lines are left out", False
            kept += line if is_kept else b""
    except OSError as error:
        wrong = f"cannot be read: {reason(error)}"
    if wrong is not None:
        aside = free_name(path)
        os.rename(path, aside)
        to_stderr(f"{path}: {wrong}; the file as it was is now {aside.name}")
    atomic_write(path, bytes(kept), links=False)


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file that is no link; none without a file. Raises OSError."""
    if os.path.lexists(path):
        lines = io.BytesIO(read_file(path, _MOST_BYTES, links=False))
        yield from (line for line in lines if line.endswith(b"\n"))
