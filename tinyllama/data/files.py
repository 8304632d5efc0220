"""Files of text -> documents, in chunks of bounded size.

    find_sources     names, folders and globs -> files, in an order that does not change
    cut              one file -> byte ranges of about 1 MiB, cut between rows or after line ends
    unpacked         gzip, zstd and Parquet -> files that are read like others, for a while
    read_chunk       one range -> the texts in it
    read_rows        one range -> the conversations in it
    read_joined      one range of a document -> its text, cut where a tokenizer may be cut
    content_digests  files -> SHA-256, remembered for as long as a file is untouched

A file has rows (JSON Lines, a JSON array, CSV, Parquet), each a document of {"text": ...} or a
conversation, as its first row has it; or it is one document. detect.py says which. A text is taken
exactly as it is (line ends, tabs, spaces); only a byte order mark at the start is dropped.
"""

import glob
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar

import msgspec

from tinyllama.data import json_array, table
from tinyllama.data.conversations import COLUMNS, Conversation, Kind, kind_of, parse
from tinyllama.data.detect import BOM, COMPRESSED, HEAD_BYTES, SUFFIXES, Format, detect, is_read
from tinyllama.data.jsonl import parse_object, parse_row
from tinyllama.data.packed import Packing, decompressed, packing_of, parquet_kind, unpack
from tinyllama.errors import DataError, WeightsError, reason
from tinyllama.formats import hub
from tinyllama.system.files import (
    atomic_write,
    is_regular,
    make_folder,
    read_file,
    sha256_file,
)
from tinyllama.system.notices import to_stderr
from tinyllama.system.progress_bar import progress_bar
from tinyllama.system.untrusted import MOST_BYTES, parse_json

T = TypeVar("T")

if TYPE_CHECKING:
    from tqdm import tqdm

CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 64 << 20  # a row is parsed whole, so it bounds the memory

_WINDOW = 1 << 14  # characters behind a border in which a joint is looked for
_BEFORE_BYTES = 8  # two characters
_VALIDATION = {"val", "valid", "validation", "test"}  # names without their suffix
_PACKED_SUFFIXES = (".parquet", *(f"{s}{packed}" for s in SUFFIXES for packed in COMPRESSED))
_DIGESTS_FILE = "digests.json"
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Source:
    """A file of text; `signature` changes whenever the file is written."""

    path: Path
    size_bytes: int
    signature: tuple[int, ...]
    format: Format
    kind: Kind = "text"  # of its rows, by the first one
    packing: Packing | None = None  # what must be undone before it can be read, see unpacked
    unpacked: Path | None = None

    @property
    def stored(self) -> Path:
        """The file to read."""
        return self.unpacked or self.path

    @property
    def has_rows(self) -> bool:
        """Whether each row is a document of its own."""
        return self.format != "text"

    def check_unchanged(self) -> None:
        """Raise DataError if the file is no longer what it was when it was found."""
        if _signature(self.path) != self.signature:
            raise self.changed()

    def changed(self) -> DataError:
        """The error of a file that is written to while it is read."""
        return DataError(f"{self.path}: the file was changed while it was being read")


@dataclass(frozen=True)
class Chunk:
    """Bytes `start` to `end` of a source."""

    source: Source
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.source.size_bytes


def find_sources(patterns: str | Sequence[str]) -> list[Source]:
    """Files that the patterns name: a file; a folder, for the files in it and its folders that have
    one of SUFFIXES; a glob (`**` reaches into folders), for every file it matches; or a data set on
    the hub, see hub.fetch_data.

    In the order of the patterns, by name within each, every file once. Raises DataError, with all
    problems at once: nothing found, a file that is named and empty, only empty files, a format
    that is not read.
    """
    sources: dict[Path, Source] = {}
    problems = []
    names = [patterns] if isinstance(patterns, str) else patterns
    for pattern in names:
        try:
            for path in _expand(pattern):
                sources.setdefault(Path(os.path.realpath(path)), _look_at(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    if not sources:
        raise DataError("no files of text are named")
    if not any(source.size_bytes for source in sources.values()):
        raise DataError(f"{', '.join(names)}: all of its files are empty")
    return list(sources.values())


def cut(source: Source) -> Iterator[Chunk]:
    """The whole file in ranges that end after a row or a line, so that no piece of text is torn.

    Text without a line end for 1 MiB is cut between two characters. Depends on nothing but the
    file. Raises DataError for a row past MAX_ROW_BYTES, and for a JSON array or table that has no
    rows to cut between.
    """
    start = 0
    with _open(source.stored) as file, _placed(source):
        for end in _possible_ends(file, source):
            if end - start >= CHUNK_BYTES or end == source.size_bytes:
                yield Chunk(source, start, end)
                start = end
    if start < source.size_bytes:
        raise source.changed()


def read_chunk(chunk: Chunk) -> list[str]:
    """The texts in a chunk: its rows, those of conversations as their messages joined by blank
    lines, or the one part of a document (which may be "").

    Raises DataError for bytes that are not UTF-8 and for bad rows, with the place.
    """
    if not chunk.source.has_rows:
        text = _content(chunk)[1]
        return [text.removeprefix("\ufeff") if chunk.start == 0 else text]
    if chunk.source.kind != "text":
        return read_rows(chunk, _spoken)
    return _rows(chunk, parse_row, lambda row: str(row["text"]))


def read_rows(chunk: Chunk, use: Callable[[list[Conversation]], T]) -> list[T]:
    """What `use` makes of each row's conversations, see conversations.parse.

    Raises DataError for bytes that are not UTF-8, for bad rows, and where `use` does, with the
    place.
    """

    def parsed(row: Any) -> T:
        return use(parse(row, chunk.source.kind))

    return _rows(chunk, lambda data: parsed(parse_object(data)), parsed)


def _spoken(conversations: list[Conversation]) -> str:
    """What is said in the first of the conversations."""
    contents = (message.get("content") for message in conversations[0].messages)
    return "\n\n".join(content for content in contents if isinstance(content, str))


def _rows(
    chunk: Chunk, of_json: Callable[[bytes], T], of_table: Callable[[dict[str, str]], T]
) -> list[T]:
    data, text = _content(chunk)
    if chunk.source.format in ("json", "jsonl"):
        del text  # a row may be large
        return (_array_rows if chunk.source.format == "json" else _lines)(data, chunk, of_json)
    return _table_rows(text, chunk, of_table)


def _content(chunk: Chunk) -> tuple[bytes, str]:
    """The bytes of a chunk and its characters. Raises DataError for bytes that are not UTF-8."""
    source = chunk.source
    with _open(source.stored) as file:
        file.seek(chunk.start)
        data = file.read(chunk.end - chunk.start)
    if len(data) != chunk.end - chunk.start:
        raise source.changed()
    try:
        return data, data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _lines_before(chunk) + data[: error.start].count(b"\n") + 1
        place = f"{source.path}, line {line}: byte {chunk.start + error.start}"
        raise DataError(
            f"{place} (0x{data[error.start]:02x}) is not UTF-8; convert the file to UTF-8"
        ) from None


def read_joined(chunk: Chunk, joint: re.Pattern[str]) -> str:
    """The part of a document from the first joint behind the chunk's start to the first behind its
    end, so that the parts, cut behind a match of `joint`, make up the document.

    Where there is none for WINDOW characters, the chunk's own border is taken. Raises DataError.
    """
    (own,) = read_chunk(chunk)
    with _open(chunk.source.stored) as file:
        file.seek(max(chunk.start - _BEFORE_BYTES, 0))
        before = file.read(min(chunk.start, _BEFORE_BYTES)).decode(errors="ignore")
        file.seek(chunk.end)
        behind = file.read(4 * _WINDOW).decode(errors="ignore")
    text = before + own + behind
    start, end = len(before), len(before) + len(own)
    return text[_joint_behind(text, start, joint) : _joint_behind(text, end, joint)]


def _joint_behind(text: str, at: int, joint: re.Pattern[str]) -> int:
    """The end of the first match that ends at `at` or behind."""
    if at == 0 or at == len(text):
        return at
    match = joint.search(text, at - 1, at + _WINDOW)
    return at if match is None else match.end()


def read_texts(sources: Iterable[Source], *, progress: bool = False) -> Iterator[str]:
    """Every text of the sources in turn, long ones in parts: for training a tokenizer."""
    with unpacked(sources) as ready, bytes_bar(ready, "Reading", progress) as bar:
        for source in ready:
            for chunk in cut(source):
                yield from read_chunk(chunk)
                bar.update(chunk.end - chunk.start)


def bytes_bar(sources: Iterable[Source], what: str, shown: bool) -> "tqdm[None]":
    """A bar over the bytes of the sources, on standard error."""
    total = sum(source.size_bytes for source in sources)
    return progress_bar(total, what, "B", scaled=True, shown=shown)


def content_digests(sources: Iterable[Source], folder: Path) -> list[str]:
    """SHA-256 of each file's bytes, in hex.

    Dates alone can lie (rsync -t, a second write within one tick of the clock) and reading 10 GB
    at every start is slow, so digests are kept in `folder` beside size, inode, mtime and ctime.
    ctime cannot be set back, and a file younger than two seconds is never remembered: a write
    that follows could leave all four as they are (git's index has the same rule).
    """
    known = _remembered(folder / _DIGESTS_FILE)
    digests, is_new = [], False
    for source in sources:
        name, signature = os.path.realpath(source.path), list(source.signature)
        if name not in known or known[name][0] != signature:
            digest = _hash_source(source)
            if _is_settled(source):
                known[name], is_new = (signature, digest), True
            else:
                known.pop(name, None)
            digests.append(digest)
        else:
            digests.append(known[name][1])
    if is_new:
        remembered = _Digests(known, "")
        remembered.sum = remembered.summed()
        make_folder(folder, 0o700)
        atomic_write(folder / _DIGESTS_FILE, msgspec.json.encode(remembered), links=False)
    return digests


_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Digests(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of digests.json: by path, what the file system said of a file, and its digest;
    and a sum of that."""

    files: dict[str, tuple[list[int], _Digest]]
    sum: str

    def summed(self) -> str:
        return hashlib.blake2b(msgspec.json.encode(self.files), digest_size=32).hexdigest()


def is_cache(folder: Path) -> bool:
    """Whether a folder is one that tokens are kept in."""
    return is_regular(folder / _DIGESTS_FILE)


def _remembered(file: Path) -> dict[str, tuple[list[int], str]]:
    """Digests that were kept; none where they are damaged, since they only save time."""
    if not os.path.lexists(file):
        return {}
    try:
        kept = parse_json(read_file(file, MOST_BYTES, links=False), _Digests, DataError, str(file))
        if kept.sum == kept.summed():
            return kept.files
        what = f"{file}: damaged: its sum does not hold"
    except OSError as error:
        what = f"{file}: cannot be read: {reason(error)}"
    except DataError as error:
        what = str(error)
    to_stderr(f"{what}; the texts are read again")
    return {}


def _hash_source(source: Source) -> str:
    try:
        digest = sha256_file(source.path)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {reason(error)}") from error
    source.check_unchanged()
    return digest


def _is_settled(source: Source) -> bool:
    """Whether the last write is old enough that another one would change the dates."""
    *_, mtime_ns, ctime_ns = source.signature
    return time.time() - max(mtime_ns, ctime_ns) / 1e9 > _SETTLED_SECONDS


def _expand(pattern: str) -> list[Path]:
    """The files that one pattern names, by name. Raises DataError if there are none."""
    if not pattern.strip():
        raise DataError("a path is empty")
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        return _walk(path)
    if path.exists():
        if path.stat().st_size == 0:
            raise DataError(f"{pattern}: the file is empty")
        return [path]
    if hub.names_data(pattern) and not path.parent.is_dir():
        try:
            return hub.fetch_data(pattern, (*SUFFIXES, *_PACKED_SUFFIXES))
        except WeightsError as error:
            raise DataError(str(error)) from None
    if not glob.has_magic(pattern):
        raise DataError(f"{pattern}: no such file or folder")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if files := [match for match in matches if match.is_file()]:
        return files
    raise DataError(f"{pattern}: the glob matches {'only folders' if matches else 'nothing'}")


def _walk(folder: Path) -> list[Path]:
    """The files below `folder` that have one of SUFFIXES. A folder with training and validation
    rows is refused: trained on both, the validation loss would mean nothing."""
    files = sorted(path for path in folder.rglob("*") if is_read(path) and path.is_file())
    if not files:
        listed = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"{folder}: the folder holds no {listed} file")
    names = {path.stem: path.name for path in files if path.parent == folder}
    if "train" in names and (held_out := sorted(names.keys() & _VALIDATION)):
        both = f"{names['train']} and {names[held_out[0]]}"
        raise DataError(f"{folder}: holds {both}: name the one to read")
    return files


def _signature(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error
    return (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


def _look_at(path: Path) -> Source:
    signature = _signature(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error
    packing = packing_of(head)
    if packing == "parquet":
        kind = parquet_kind(path)
        return Source(path, signature[0], signature, "jsonl", kind, packing)
    if packing is None:
        source = Source(path, signature[0], signature, detect(path, head))
    else:
        with decompressed(path, packing) as file:
            head = file.read(HEAD_BYTES)
        if packing_of(head) is not None:
            raise DataError(f"{path}: is packed twice; unpack it first")
        kind_of_file = detect(Path(path.stem), head, path)
        source = Source(path, signature[0], signature, kind_of_file, packing=packing)
    return replace(source, kind=_kind(source, head))


def _kind(source: Source, head: bytes) -> Kind:
    """The kind of a file's rows, by the first one; text where that cannot be read, so that the
    error is that of reading it."""
    if not source.has_rows:
        return "text"
    if source.format in ("csv", "tsv"):
        return _kind_of_table(source, head)
    with _opened(source) as file:
        data = _first_row(file, source.format)
    try:
        row = parse_object(data)
    except (DataError, UnicodeDecodeError):
        return "text"
    return (kind_of(row) if isinstance(row, dict) else None) or "text"


def _kind_of_table(source: Source, head: bytes) -> Kind:
    header = io.BytesIO(head)
    try:
        end = next(table.row_ends(header, source.format, MAX_ROW_BYTES), 0)
        return table.columns(head[:end].removeprefix(BOM), source.format)[1]
    except (table.TableError, UnicodeDecodeError):
        return "text"


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """What a source holds, compressed or not."""
    if source.packing in ("gzip", "zstd"):
        with decompressed(source.path, source.packing) as file:
            yield file
    else:
        with _open(source.stored) as file:
            yield file


def _first_row(file: BinaryIO, form: Format) -> bytes:
    """The first row of JSON Lines or of an array; b"" where there is none."""
    if form == "json":
        try:
            end = next(json_array.row_ends(file, MAX_ROW_BYTES))
        except json_array.ArrayError:
            return b""
        file.seek(0)
        data = file.read(end).removeprefix(BOM)
        return next((row for _, row in json_array.rows(data, is_first=True)), b"")
    line = file.readline(MAX_ROW_BYTES).removeprefix(BOM)
    while line and not line.strip():
        line = file.readline(MAX_ROW_BYTES)
    return line


@contextmanager
def unpacked(sources: Iterable[Source], folder: Path | None = None) -> Iterator[list[Source]]:
    """The sources as files that can be read anywhere: those that are packed are unpacked into
    `folder` (None: that of temporary files) and removed afterwards. Raises DataError."""
    sources = list(sources)
    if not any(source.packing for source in sources):
        yield sources
        return
    with TemporaryDirectory(dir=folder, prefix=".unpacked-") as made:
        ready = []
        for number, source in enumerate(sources):
            if source.packing is not None:
                place = Path(made) / str(number)
                unpack(source.path, source.packing, place, COLUMNS)
                size = place.stat().st_size
                source = replace(source, size_bytes=size, unpacked=place)
            ready.append(source)
        yield ready


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error


def _possible_ends(file: BinaryIO, source: Source) -> Iterator[int]:
    """Where a chunk of a file may end, in order; the last is the file's size."""
    if source.format == "json":
        yield from json_array.row_ends(file, MAX_ROW_BYTES)
    elif source.format in ("csv", "tsv"):
        yield from table.row_ends(file, source.format, MAX_ROW_BYTES)
    else:
        end = -1
        while end < source.size_bytes:
            end = _line_end(file, source, max(end, 0))
            yield end


@contextmanager
def _placed(source: Source) -> Iterator[None]:
    """Name the file, and the line, in errors about its array or table."""
    try:
        yield
    except json_array.ArrayError as error:
        source.check_unchanged()
        raise DataError(f"{source.path}: {error}") from None
    except table.TableError as error:
        source.check_unchanged()
        raise DataError(f"{source.path}, line {error.line}: {error}") from None


def _line_end(file: BinaryIO, source: Source, start: int) -> int:
    """Where the chunk of lines or text that begins at `start` ends."""
    position = start + CHUNK_BYTES
    limit = position + (MAX_ROW_BYTES if source.has_rows else CHUNK_BYTES)
    file.seek(position)
    while position < min(limit, source.size_bytes):
        block = file.read(min(1 << 16, limit - position))
        if not block:
            raise source.changed()
        if (newline := block.find(b"\n")) >= 0:
            return position + newline + 1
        position += len(block)
    if position >= source.size_bytes:
        return source.size_bytes
    if source.has_rows:
        raise DataError(
            f"{source.path}: a row after byte {start} is longer than {MAX_ROW_BYTES} bytes;"
            " put so long a text into a .txt file"
        )
    file.seek(start + CHUNK_BYTES)
    after = file.read(4)  # a UTF-8 character has at most three bytes 10xxxxxx, behind its first
    return start + CHUNK_BYTES + len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))


def _lines(data: bytes, chunk: Chunk, parse: Callable[[bytes], T]) -> list[T]:
    """What JSON Lines hold. Raises DataError with the line."""
    if chunk.start == 0:
        data = data.removeprefix(BOM)
    values = []
    for number, line in enumerate(data.split(b"\n")):
        try:
            if line.strip():
                values.append(parse(line))
        except DataError as error:
            what = "row" if chunk.source.packing == "parquet" else "line"
            place = f"{chunk.source.path}, {what} {_lines_before(chunk) + number + 1}"
            raise DataError(f"{place}: {error}") from None
    return values


def _array_rows(data: bytes, chunk: Chunk, parse: Callable[[bytes], T]) -> list[T]:
    """What rows of a JSON array hold. Raises DataError with the row and its line."""
    values = []
    for number, (begin, row) in enumerate(json_array.rows(data, is_first=chunk.start == 0)):
        try:
            values.append(parse(row))
        except DataError as error:
            with _open(chunk.source.stored) as file:
                ends = json_array.row_ends(file, MAX_ROW_BYTES)
                before = sum(1 for _ in takewhile(lambda end: end <= chunk.start, ends))
            line = _lines_before(chunk) + data[:begin].count(b"\n") + 1
            place = f"{chunk.source.path}, row {before + number + 1}, line {line}"
            raise DataError(f"{place}: {error}") from None
    return values


def _table_rows(text: str, chunk: Chunk, parse: Callable[[dict[str, str]], T]) -> list[T]:
    """What rows of a table hold. Raises DataError with the line."""
    source = chunk.source
    with _open(source.stored) as file, _placed(source):
        header_bytes = next(table.row_ends(file, source.format, MAX_ROW_BYTES), 0)
        file.seek(0)
        header = file.read(header_bytes)
        names, _ = table.columns(header.removeprefix(BOM), source.format)
    if chunk.start == 0:
        text = text[len(header.decode()) :]
    values, line = [], 1
    try:
        for at, row in table.rows(text, source.format, names):
            line = at
            values.append(parse(row))
    except (table.TableError, DataError) as error:
        line = error.line if isinstance(error, table.TableError) else line
        before = _lines_before(chunk) if chunk.start else header.count(b"\n")
        raise DataError(f"{source.path}, line {before + line}: {error}") from None
    return values


def _lines_before(chunk: Chunk) -> int:
    """Line ends in the file before a chunk."""
    with _open(chunk.source.stored) as file:
        return sum(
            file.read(min(CHUNK_BYTES, chunk.start - at)).count(b"\n")
            for at in range(0, chunk.start, CHUNK_BYTES)
        )
