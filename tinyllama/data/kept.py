"""Arrays that were computed once and are kept in a folder, with sums, read when they are used.

The folder's name is a digest of all that decides the numbers. It appears when it is whole; one
that is damaged, or was put there by a stranger, is removed and made again.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.errors import DataError, reason
from tinyllama.system import checked
from tinyllama.system.files import (
    atomic_directory,
    discard,
    make_folder,
    pieces_digest,
    remove_partials,
)
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import read_json_file

_META_FILE = "meta.json"
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Kind(NamedTuple):
    """What an array holds: its type, the numbers per row, and where its numbers must be below (None
    for any)."""

    dtype: str
    width: int
    below: int | None = None


T = TypeVar("T")
Kinds = Mapping[str, Kind]
Arrays = Mapping[str, npt.NDArray[Any]]
Writer = Callable[[str, npt.NDArray[Any]], None]


class Kept(NamedTuple):
    """Arrays (rows, width) by name, memory-mapped; the numbers that were noted beside them."""

    folder: Path
    arrays: Arrays
    notes: Mapping[str, int]


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of meta.json: rows and digest of each array, notes, and a sum of all this."""

    rows: dict[str, _Count]
    digests: dict[str, str]
    notes: dict[str, _Count]
    sum: str

    def summed(self) -> str:
        rest = msgspec.json.encode(msgspec.structs.replace(self, sum=""))
        return hashlib.blake2b(rest, digest_size=32).hexdigest()


def key_of(*made_of: Any) -> str:
    """A folder's name: a digest of plain values."""
    return hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:32]


def kept(
    cache: Path,
    name: str,
    kinds: Kinds,
    make: Callable[[Writer], Mapping[str, int]],
) -> Kept:
    """The arrays of the folder `name` in `cache`, made now where there are none.

    `make` is given a function that appends rows to an array, and returns the notes. Raises
    DataError for a folder that cannot be written.
    """
    folder = cache / name
    try:
        return opened_or_made(
            folder, lambda: _opened(folder, kinds), lambda: _make(folder, kinds, make)
        )
    except OSError as error:
        raise DataError(f"{cache}: cannot keep what was computed there: {reason(error)}") from error


def opened_or_made(folder: Path, find: Callable[[], T | None], make: Callable[[], None]) -> T:
    """What `find` finds in a folder of a cache; where that is None, what it finds once `make` has
    made the folder. Raises OSError where that cannot be written, DataError where it is damaged."""
    found = find()
    if found is None:
        make_folder(folder.parent, 0o700)
        remove_partials(folder.parent)
        try:
            make()
        except FileExistsError:
            if find() is None:  # else another run made it meanwhile
                raise
        found = find()
    if found is None:
        raise DataError(f"{folder}: damaged while it was being written")
    return found


def _make(folder: Path, kinds: Kinds, make: Callable[[Writer], Mapping[str, int]]) -> None:
    rows = dict.fromkeys(kinds, 0)
    with atomic_directory(folder) as made:
        with ExitStack() as open_files:
            files: dict[str, BinaryIO] = {
                name: open_files.enter_context(open(made / f"{name}.bin", "wb")) for name in kinds
            }

            def write(name: str, values: npt.NDArray[Any]) -> None:
                kind = kinds[name]
                array = np.ascontiguousarray(values, kind.dtype).reshape(-1, kind.width)
                files[name].write(array.data)
                rows[name] += len(array)

            notes = dict(make(write))
        digests = {name: pieces_digest(made / f"{name}.bin") for name in kinds}
        meta = _Meta(rows, digests, notes, "")
        meta.sum = meta.summed()
        (made / _META_FILE).write_bytes(msgspec.json.encode(meta))


def _opened(folder: Path, kinds: Kinds) -> Kept | None:
    """What is in `folder`; None if there is nothing, or something damaged, which is removed."""
    return opened(folder, lambda place: _open(place, kinds), "it is computed again")


def opened(folder: Path, open_folder: Callable[[Path], T], instead: str) -> T | None:
    """What `open_folder` finds in a folder; None if there is nothing, or something damaged (a
    DataError), which is removed after a line that says so, and `instead` what happens now."""
    if not os.path.lexists(folder):
        return None
    try:
        return open_folder(folder)
    except DataError as error:
        to_stderr(f"{error}; {instead}")
        with suppress(FileNotFoundError):  # another run removes it too
            discard(folder)
        return None


def _open(folder: Path, kinds: Kinds) -> Kept:
    meta = read_json_file(folder / _META_FILE, _Meta, DataError)
    if meta.sum != meta.summed():
        raise DataError(f"{folder / _META_FILE}: damaged: its sum of itself does not hold")
    if set(meta.rows) != set(kinds) or set(meta.digests) != set(kinds) or folder.is_symlink():
        raise DataError(f"{folder}: damaged: not the arrays {', '.join(sorted(kinds))}")
    arrays = {}
    for name, kind in kinds.items():
        file, rows = folder / f"{name}.bin", meta.rows[name]
        size = rows * kind.width * np.dtype(kind.dtype).itemsize
        if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
            raise DataError(f"{file}: damaged, missing or a link")
        take = partial(_digest, file, kind)
        if checked.digest(f"{kind.dtype} below {kind.below}", [file], take) != meta.digests[name]:
            raise DataError(f"{file}: damaged: its sum does not hold")
        shape = (rows, kind.width)
        arrays[name] = np.memmap(file, kind.dtype, "r", shape=shape) if size else np.zeros(shape)
    return Kept(folder, arrays, meta.notes)


def _digest(file: Path, kind: Kind) -> str:
    """A sum proves no origin, and an id past the vocabulary would be read past a row of logits:
    raises DataError for a number out of range."""

    def check(data: memoryview) -> None:
        values = np.frombuffer(data, kind.dtype)
        if kind.below is not None and len(values):
            if values.min() < 0 or values.max() >= kind.below:
                raise DataError(f"{file}: damaged: numbers that are not 0 to {kind.below - 1}")

    return pieces_digest(file, check)
