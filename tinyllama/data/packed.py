"""Compressed files and Parquet as files that can be read from any place on.

    gzip       Python's own
    zstd       pyarrow, the extra `parquet`
    parquet    the same: a line of JSON per row, of the columns that are wanted

Each is read in blocks, so that memory does not grow with the file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import msgspec

from tinyllama.data.conversations import Kind, expected, kind_of
from tinyllama.errors import DataError, reason
from tinyllama.system.untrusted import printable

Packing = Literal["gzip", "zstd", "parquet"]

_MAGIC: dict[bytes, Packing] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}
_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 256


def packing_of(head: bytes) -> Packing | None:
    """What a file that begins with `head` is packed with."""
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def decompressed(path: Path, packing: Literal["gzip", "zstd"]) -> Iterator[BinaryIO]:
    """A compressed file, opened for reading what it holds. Raises DataError."""
    if packing == "zstd":
        with _reading(path), _arrow(path).CompressedInputStream(str(path), "zstd") as stream:
            yield io.BufferedReader(stream)
        return
    try:
        with gzip.open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged, as gzip: {error}") from None


def parquet_kind(path: Path) -> Kind:
    """The kind of a Parquet file's rows. Raises DataError if it is none."""
    with _reading(path) as arrow:
        names = arrow.ParquetFile(path).schema_arrow.names
    kind = kind_of(set(names))
    if kind is None:
        listed = ", ".join(printable(repr(name), 40) for name in names[:8]) or "none"
        hint = f'name the column that holds the text "text" (or columns {expected("prompt")})'
        raise DataError(f'{path}: no column "text"; columns: {listed}; {hint}')
    return kind


def unpack(path: Path, packing: Packing, to: Path, columns: set[str]) -> None:
    """Write what `path` holds to the file `to`. Raises DataError."""
    try:
        with open(to, "wb") as out:
            for block in _blocks(path, packing, columns):
                out.write(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be unpacked into {to.parent}: {reason(error)}") from error


def _blocks(path: Path, packing: Packing, columns: set[str]) -> Iterator[bytes]:
    if packing == "parquet":
        with _reading(path) as arrow:
            file = arrow.ParquetFile(path)
            wanted = [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                yield b"".join(msgspec.json.encode(row) + b"\n" for row in batch.to_pylist())
        return
    with decompressed(path, packing) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """pyarrow's reader of Parquet; raises DataError for what it raises."""
    arrow = _arrow(path)
    import pyarrow.parquet

    try:
        yield pyarrow.parquet
    except (arrow.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: damaged: {printable(first)}") from None


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path}: to read it, type: pip install 'tinyllama-trainer[parquet]'"
        ) from error
    return pyarrow
