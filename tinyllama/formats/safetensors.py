"""The safetensors format, written as a stream and read through a memory map.

Tensors are laid out widest type first, then by name, which keeps every one of them aligned to its
own type; that is the official library's order, so equal tensors give equal bytes. Nothing
here can run code from a file.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.errors import WeightsError
from tinyllama.formats.dtypes import (
    BITS,
    NUMPY,
    Array,
    NumpyArray,
    RawArray,
    bits_of,
    convert,
    dtype_name,
    to_float32,
)
from tinyllama.system.untrusted import open_regular, place_first, printable, what_it_is

# Of 30,000 tensors; a LLaMA has some hundred. The official library refuses 25 times as much, whose
# parsed form takes gigabytes.
MAX_HEADER_BYTES = 4_000_000
# Longer ones are checked for their form first: the objects of any JSON text take much longer.
_LONG_HEADER_BYTES = 100_000
_MAX_AXES = 64
_METADATA = "__metadata__"


class TensorInfo(NamedTuple):
    """Where a tensor lies in its file; `offset` counts from the first byte of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Header(NamedTuple):
    """A checked header: tensors in the order of their bytes, and the free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a file.

    Everything the official library refuses is refused, and repeated names as well; WeightsError
    names the file and the tensor.
    """
    with open_regular(path, WeightsError) as (file, size):
        return _read_header(file, os.fspath(path), size)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file whose tensors (name, dtype, shape) follow in this order."""
    entries: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if name == _METADATA:
            raise WeightsError(f"{_METADATA} is not a tensor name: the format keeps it for itself")
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise WeightsError(f"header of {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return len(text).to_bytes(8, "little") + text


def _read_header(file: BinaryIO, path: str, file_bytes: int) -> Header:
    first = file.read(64)
    if what := what_it_is(first):
        raise WeightsError(f"{path}: is {what}")
    if file_bytes < 8:
        raise WeightsError(f"{path}: {file_bytes} bytes, too short for a safetensors file")
    header_bytes = int.from_bytes(first[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed: "
            "not a safetensors file, or damaged"
        )
    if 8 + header_bytes > file_bytes:
        raise WeightsError(
            f"{path}: truncated: the header ends at byte {8 + header_bytes} of {file_bytes}"
        )
    file.seek(8)
    entries = _parse_json(path, file.read(header_bytes))
    metadata = _check_metadata(path, entries.pop(_METADATA, None))
    start = 8 + header_bytes
    tensors = {name: _check_entry(path, name, entry, start) for name, entry in entries.items()}
    order = sorted(tensors, key=lambda name: tensors[name][2:])
    end = start
    for name in order:
        offset = tensors[name].offset
        if offset != end:
            wrong = "a gap before it" if offset > end else "an overlap with the one before"
            label = f"{path}: {printable(name)}"
            raise WeightsError(f"{label}: begins at byte {offset}, must be {end} ({wrong})")
        end += tensors[name].size_bytes
    if end != file_bytes:
        wrong = "truncated" if file_bytes < end else "bytes after the last tensor"
        raise WeightsError(f"{path}: {file_bytes} bytes, its header describes {end} ({wrong})")
    return Header({name: tensors[name] for name in order}, metadata)


def _parse_json(path: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    break
                seen.add(name)
            raise WeightsError(f"{path}: {printable(repr(name))} appears twice in the header")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        if len(text) > _LONG_HEADER_BYTES:
            msgspec.json.decode(text, type=dict[str, dict[str, str | list[int]]])
        entries = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
        "".join(entries).encode()  # half a surrogate pair is not a name
    except msgspec.ValidationError as error:
        raise WeightsError(f"{path}: the header: {place_first(error)}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the header is not JSON: {printable(error)}") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: the header is not a JSON object")
    return entries


def _check_metadata(path: str, value: Any) -> dict[str, str]:
    metadata = {} if value is None else value
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: {_METADATA}: must map strings to strings")
    return metadata


def _check_entry(path: str, name: str, entry: Any, start: int) -> TensorInfo:
    label = f"{path}: {printable(name)}"
    if not isinstance(entry, dict):
        raise WeightsError(f"{label}: must be an object, {_got(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise WeightsError(f"{label}: dtype: {_got(dtype)}, must be one of {', '.join(BITS)}")
    if not _are_sizes(shape):
        raise WeightsError(f"{label}: shape: {_got(shape)}, must be a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{label}: data_offsets: {_got(offsets)}, must be [begin, end]")
    bits, size_bytes = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * size_bytes:
        takes = f"{bits / 8:g}" if bits < 1 << 70 else "more than any file has"
        raise WeightsError(
            f"{label}: {size_bytes} bytes, but {dtype} of shape {printable(shape)} takes {takes}"
        )
    return TensorInfo(dtype, tuple(shape), start + offsets[0], size_bytes)


def _got(value: Any) -> str:
    """What an entry holds, for a message."""
    return f"got {printable(repr(value))}"


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and 0 <= value < 1 << 64 for value in values)
    )


_CHUNK_ELEMENTS = 1 << 17  # a conversion's work space stays in the processor's cache
_RANK = {name: rank for rank, name in enumerate(BITS)}


class FileDigest(NamedTuple):
    """What was written to a file, known without reading it again."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class LazyArray:
    """A tensor to be copied from its device when its turn comes: stored as `dtype`, whatever
    floating type `load` returns, and of exactly `shape`."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


Source = Array | LazyArray | Callable[[], Array]


def as_lazy(name: str, source: Source) -> LazyArray:
    """Any source with its type and shape; a plain callable is called once to learn them.

    Raises WeightsError for a numpy type that the format has no name for.
    """
    if isinstance(source, LazyArray):
        return source
    array = source if isinstance(source, np.ndarray | RawArray) else source()
    dtype, shape = dtype_name(name, array), tuple(array.shape)
    # The array of a callable is dropped here: only one tensor is held at a time.
    return LazyArray(dtype, shape, source if callable(source) else lambda: array)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Source],
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write one file, a tensor at a time, and return its SHA-256, taken on the way out.

    `metadata` defaults to {"format": "pt"}. No fsync: the folder that the file is part of does
    that. Raises WeightsError (a tensor that does not fit its declared shape or type), OSError.
    """
    lazy = {name: as_lazy(name, source) for name, source in tensors.items()}
    order = sorted(lazy, key=lambda name: (-_RANK[lazy[name].dtype], name))
    header = build_header(
        ((name, lazy[name].dtype, lazy[name].shape) for name in order),
        {"format": "pt"} if metadata is None else metadata,
    )
    digest, size_bytes = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in _file_chunks(os.fspath(path), header, order, lazy):
            digest.update(chunk)
            file.write(chunk)
            size_bytes += len(chunk)
            del chunk  # it keeps its tensor alive, and the next one is loaded before it is rebound
    return FileDigest(digest.hexdigest(), size_bytes)


class SafetensorsFile:
    """One file behind a memory map: a tensor is read when it is used, not before."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_regular(path, WeightsError) as (file, size):
            self.tensors, self.metadata = _read_header(file, os.fspath(path), size)
            # The map lives as long as the last array that looks into it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order of their bytes."""
        return tuple(self.tensors)

    def dtype(self, name: str) -> str:
        """The format's name of the type, such as "BF16"."""
        return self._info(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._info(name).shape

    def array(self, name: str) -> NumpyArray:
        """A read-only view of the tensor; BF16 comes as uint16 and the 8-bit floats as uint8."""
        info = self._info(name)
        if info.dtype not in NUMPY:
            raise WeightsError(f"{self.path}: {name}: type {info.dtype} cannot be read here")
        flat = np.frombuffer(
            self._map, NUMPY[info.dtype], count=math.prod(info.shape), offset=info.offset
        )
        # Files whose header is not padded exist; unaligned data are copied, one tensor at a time.
        return np.require(flat, requirements="A").reshape(info.shape)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, from F32 (a view), F16 or BF16 (a copy; exact in both cases)."""
        return to_float32(name, self.source(name).load())

    def source(self, name: str) -> LazyArray:
        """The tensor as `write_safetensors` takes it, still unread."""
        info = self._info(name)
        return LazyArray(
            info.dtype, info.shape, lambda: RawArray(info.dtype, info.shape, self.array(name))
        )

    def forget(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process; they return when read."""
        info = self._info(name)
        start = info.offset - info.offset % mmap.PAGESIZE
        if info.size_bytes and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no madvise
            self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.size_bytes - start)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise WeightsError(f"{self.path}: {name}: no such tensor")
        return self.tensors[name]


def _file_chunks(
    path: str, header: bytes, order: list[str], lazy: Mapping[str, LazyArray]
) -> Iterator[bytes | memoryview]:
    yield header
    for name in order:
        yield from _tensor_chunks(f"{path}: {name}", lazy[name])


def _tensor_chunks(label: str, lazy: LazyArray) -> Iterator[memoryview]:
    """A tensor's bytes, a chunk at a time: a conversion never makes a second copy of the whole."""
    array = lazy.load()
    dtype, data = dtype_name(label, array), bits_of(array)
    if tuple(array.shape) != lazy.shape:
        raise WeightsError(f"{label}: shape {tuple(array.shape)}, must be {lazy.shape}")
    flat = data.reshape(-1) if data.flags.c_contiguous else data.flat  # neither copies
    for start in range(0, data.size, _CHUNK_ELEMENTS):
        part = np.asarray(flat[start : start + _CHUNK_ELEMENTS])
        part = part.astype(NUMPY[dtype], copy=False)  # little endian
        part = convert(label, RawArray(dtype, part.shape, part), lazy.dtype)
        yield part.view(np.uint8).data
