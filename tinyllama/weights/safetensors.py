"""The safetensors format, written as a stream and read through a memory map.

Tensors are laid out widest type first, then by name, which keeps every one of them aligned to its
own type; that is the official library's order, so equal tensors give equal bytes. The header is
described in header.py. Nothing here can run code from a file.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.errors import WeightsError
from tinyllama.weights.dtypes import (
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
from tinyllama.weights.header import TensorInfo, build_header, read_header

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
    """One file behind a memory map: a tensor is read when it is asked for, and not before."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tensors, self.metadata = read_header(path)
        with open(path, "rb") as file:
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
        if info.size_bytes:
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
