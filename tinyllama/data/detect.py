"""The format of a file of text: by its content, and by its suffix where that is not enough.

    text    one document, taken as it is
    jsonl   JSON Lines, a document per line (.jsonl, .ndjson, or lines that are JSON objects)
    json    one JSON array with a document per row (.json, or an array of objects)
    csv     a table with a column "text" (.csv; .tsv with tabs), a document per row

Compressed and binary files are refused with the command that converts them.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Literal

from tinyllama.errors import DataError

Format = Literal["text", "jsonl", "json", "csv", "tsv"]

SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".tsv", ".txt")  # what is read of a folder
COMPRESSED = (".gz", ".zst", ".zstd")
BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16  # decides

# How a file begins -> what it is and how it becomes one that is read.
_REFUSED = {
    b"\xfd7zXZ\x00": ("is compressed with xz", "decompress it first: xz -dk {}"),
    b"BZh": ("is compressed with bzip2", "decompress it first: bunzip2 -k {}"),
    b"PK\x03\x04": ("is a zip archive", "unpack it first: unzip {}"),
    b"ARROW1": ("is an Arrow file", "convert it to JSON Lines first, {}"),
}
_PANDAS = {
    b"ARROW1": 'with pandas: read_feather(FILE).to_json(NEW, orient="records", lines=True)',
}
_ARRAY = re.compile(rb"\s*\[\s*[{\]]")
_ARRAY_OF_OBJECTS = re.compile(rb'\s*\[\s*\{\s*"[^"\n]*"\s*:')
_OBJECT = re.compile(rb'\{\s*"[^"\n]*"\s*:')


def is_read(path: Path) -> bool:
    """Whether a file of this name is read where its folder is named."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return path.suffix.lower() == ".parquet" or name.suffix.lower() in SUFFIXES


def detect(path: Path, head: bytes, shown: Path | None = None) -> Format:
    """The format of a file that begins with `head` (HEAD_BYTES or the whole file). Errors
    name it as `shown` where that is given.

    Raises DataError for one that must be decompressed or converted first.
    """
    for magic, (what, advice) in _REFUSED.items():
        if head.startswith(magic):
            advice = advice.format(_PANDAS.get(magic) or shlex.quote(str(path)))
            raise DataError(f"{shown or path}: {what}, which is not read; {advice}")
    head = head.removeprefix(BOM)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return "csv"
    if suffix == ".tsv":
        return "tsv"
    if suffix == ".json" and head.lstrip().startswith(b"["):
        return "json"
    if suffix in (".json", ".jsonl", ".ndjson"):
        return "json" if _ARRAY.match(head) else "jsonl"
    # The suffix is of no help, as in rows.jsonl.txt.
    if _ARRAY_OF_OBJECTS.match(head):
        return "json"
    return "jsonl" if _has_rows(head) else "text"


def _has_rows(head: bytes) -> bool:
    """Whether a file's first two lines with anything in them are JSON objects, or its only one."""
    lines = head.split(b"\n")
    is_cut = len(head) >= HEAD_BYTES
    if is_cut and len(lines) == 1:
        return _OBJECT.match(head.lstrip()) is not None
    whole = [line for line in lines[: -1 if is_cut else None] if line.strip()][:2]
    return bool(whole) and all(map(_is_object, whole))


def _is_object(line: bytes) -> bool:
    if _OBJECT.match(line.lstrip()) is None:  # nor is `{}`, which prose may begin with
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
