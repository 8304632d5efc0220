"""samples.jsonl of a run: what its model wrote after so many steps, one object per line."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from tinyllama.errors import CheckpointError, reason
from tinyllama.system.files import atomic_write, free_name, open_regular
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import parse_json

SAMPLES = "samples.jsonl"
_MOST_BYTES = 32 << 20  # that are shown, the newest
_MOST_LINE_BYTES = 1 << 20
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
        newest = deque(_lines(path, _MOST_BYTES), _MOST_SHOWN)
        return [parse_json(line, Sample, CheckpointError, source) for line in newest]
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


def _lines(path: Path, newest_bytes: int | None = None) -> Iterator[bytes]:
    """The whole lines of a file that is no link, or those of its last bytes, and pieces of lines
    that are longer than any of ours; none without a file. Raises OSError."""
    if not os.path.lexists(path):
        return
    with open_regular(path, links=False) as file:
        if newest_bytes is not None and os.fstat(file.fileno()).st_size > newest_bytes:
            file.seek(-newest_bytes, os.SEEK_END)
            file.readline(_MOST_LINE_BYTES)  # begins before
        while line := file.readline(_MOST_LINE_BYTES):
            if line.endswith(b"\n") or len(line) == _MOST_LINE_BYTES:
                yield line
