"""Large files whose sums were found to hold, remembered for a day.

    by path: device, inode, bytes, mtime, ctime, the sum, when it was taken

Reading 13 GB before each command is slow, and a file that is written to changes its ctime, which
cannot be set back. What time does to a disk changes none of these, so a check is believed for a day
only. The file lies in a folder that is closed to others.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from tinyllama.errors import TinyllamaError
from tinyllama.system import device
from tinyllama.system.files import atomic_write, private_folder
from tinyllama.system.json_files import read_json_file

SMALL_BYTES = 64 << 20  # read sooner than looked up
BELIEVED_SECONDS = 24 * 3600
_SETTLED_SECONDS = 2.0
_MOST_ENTRIES = 4096

_Integer = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    identity: tuple[_Integer, _Integer, _Integer, _Integer, _Integer]
    digest: str
    taken: float


class _Checked(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of checked.json."""

    entries: dict[str, _Entry]
    sum: str

    def summed(self) -> str:
        return hashlib.blake2b(msgspec.json.encode(self.entries), digest_size=32).hexdigest()


def holds(path: Path, digest: str, take: Callable[[Path], str]) -> bool:
    """Whether a file has this digest, which `take` takes. Raises OSError."""
    if path.stat().st_size < SMALL_BYTES:
        return take(path) == digest
    name, identity = os.path.realpath(path), _identity(path)
    entry = _read().get(name)
    if entry is not None and (entry.identity, entry.digest) == (identity, digest):
        if 0 <= time.time() - entry.taken < BELIEVED_SECONDS:
            return True
    if take(path) != digest:
        return False
    # A file that was just written could be written again without any of its dates changing.
    is_settled = time.time() - max(identity[3:]) / 1e9 > _SETTLED_SECONDS
    if is_settled and _identity(path) == identity:
        _add(name, _Entry(identity, digest, time.time()))
    return True


def _identity(path: Path) -> tuple[int, int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
