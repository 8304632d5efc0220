"""The header of a safetensors file: built on the way out, distrusted on the way in.

    8 bytes   N, the header's length, little endian
    N bytes   JSON {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets"}}, padded
              with spaces so that the data begin at a multiple of 8
    the rest  the tensors one after another, without gaps, row-major and little endian

Whatever the official library refuses is refused, and repeated names as well; every message names
the file and the tensor. Format: https://github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from tinyllama.errors import WeightsError
from tinyllama.weights.dtypes import BITS

MAX_HEADER_BYTES = 100_000_000  # the official library refuses more
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
    try:
        with open(path, "rb") as file:
            return _read_header(file, os.fspath(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise WeightsError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


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
    if file_bytes < 8:
        raise WeightsError(f"{path}: {file_bytes} bytes, too short for a safetensors file")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed: "
            "not a safetensors file, or damaged"
        )
    if 8 + header_bytes > file_bytes:
        raise WeightsError(
            f"{path}: truncated: the header ends at byte {8 + header_bytes} of {file_bytes}"
        )
    entries = _parse_json(path, file.read(header_bytes))
    metadata = _check_metadata(path, entries.pop(_METADATA, None))
    start = 8 + header_bytes
    tensors = {name: _check_entry(path, name, entry, start) for name, entry in entries.items()}
    order = sorted(tensors, key=lambda name: tensors[name][2:])
    end = start
    for name in order:
        found = tensors[name].offset
        if found != end:
            wrong = "a gap before it" if found > end else "an overlap with the one before"
            raise WeightsError(f"{path}: {name}: begins at byte {found}, must be {end} ({wrong})")
        end += tensors[name].size_bytes
    if end != file_bytes:
        wrong = "truncated" if file_bytes < end else "bytes after the last tensor"
        raise WeightsError(f"{path}: {file_bytes} bytes, its header says {end} ({wrong})")
    return Header({name: tensors[name] for name in order}, metadata)


def _parse_json(path: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{path}: {repeated!r} appears twice in the header")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
        "".join(entries).encode()  # half a surrogate pair is not a name
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: the header is not a JSON object")
    return entries


def _check_metadata(path: str, found: Any) -> dict[str, str]:
    metadata = {} if found is None else found
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: {_METADATA}: must map strings to strings")
    return metadata


def _check_entry(path: str, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise WeightsError(f"{path}: {name}: must be an object, got {entry!r}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise WeightsError(
            f"{path}: {name}: dtype: got {dtype!r}, must be one of {', '.join(BITS)}"
        )
    if not _are_sizes(shape):
        raise WeightsError(f"{path}: {name}: shape: got {shape!r}, must be a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: {name}: data_offsets: got {offsets!r}, must be [begin, end]")
    bits, size_bytes = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * size_bytes:
        raise WeightsError(
            f"{path}: {name}: {size_bytes} bytes, but {dtype} of shape {shape} takes {bits / 8:g}"
        )
    return TensorInfo(dtype, tuple(shape), start + offsets[0], size_bytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 64 for value in values
    )
