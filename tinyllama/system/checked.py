"""Digests of large files, remembered for a day.

    by kind and path: device, inode, bytes, mtime, ctime of each file, the digest, when it was taken

Reading 13 GB before each command is slow, and a file that is written to changes its ctime, which
cannot be set back. What time does to a disk changes none of these, so a digest is believed for a
day only. They lie in a folder that is closed to others.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from tinyllama.errors import TinyllamaError
from tinyllama.system import device
from tinyllama.system.files import atomic_write, private_folder
from tinyllama.system.untrusted import read_json_file

SMALL_BYTES = 64 << 20  # read sooner than looked up
BELIEVED_SECONDS = 24 * 3600
_SETTLED_SECONDS = 2.0
_MOST_ENTRIES = 4096

_Integer = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    identity: list[_Integer]
    digest: str
    taken: float


class _Checked(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of checked.json."""

    entries: dict[str, _Entry]
    sum: str

    def summed(self) -> str:
        return hashlib.blake2b(msgspec.json.encode(self.entries), digest_size=32).hexdigest()


def digest(kind: str, paths: Sequence[Path], take: Callable[[], str]) -> str:
    """The digest that `take` takes of these files, or took within a day; `kind` names how.

    Files that are small together are always read. Raises OSError.
    """
    if sum(path.stat().st_size for path in paths) < SMALL_BYTES:
        return take()
    name = "\n".join([kind, *map(os.path.realpath, paths)])
    identity, entry = _identity(paths), _read().get(name)
    if entry is not None and entry.identity == identity:
        if 0 <= time.time() - entry.taken < BELIEVED_SECONDS:
            return entry.digest
    found = take()
    # A file that was just written could be written again without any of its dates changing.
    newest = max(date for path in paths for date in _dates(path))
    if time.time() - newest / 1e9 > _SETTLED_SECONDS and _identity(paths) == identity:
        _add(name, _Entry(identity, found, round(time.time(), 3)))
    return found


def _identity(paths: Sequence[Path]) -> list[int]:
    numbers = []
    for path in paths:
        status = path.stat()
        numbers += [status.st_dev, status.st_ino, status.st_size, *_dates(path)]
    return numbers


def _dates(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


def _file() -> Path:
    return device.cache_folder() / "checked" / "checked.json"


def _read() -> dict[str, _Entry]:
    """What is remembered; nothing where that is damaged or others could have written it."""
    try:
        private_folder(_file().parent)
        known = read_json_file(_file(), _Checked, TinyllamaError)
    except (OSError, TinyllamaError):
        return {}
    return known.entries if known.sum == known.summed() else {}


def _add(name: str, entry: _Entry) -> None:
    """Remember one more, of the newest; it only saves time, so no error where it cannot be kept."""
    known = {**_read(), name: entry}
    newest = sorted(known.items(), key=lambda item: item[1].taken)[-_MOST_ENTRIES:]
    checked = _Checked(dict(newest), "")
    checked.sum = checked.summed()
    with suppress(OSError):
        atomic_write(_file(), msgspec.json.encode(checked), links=False)
