"""Tables of comma- or tab-separated values: the column "text", or those of conversations.

Python's csv module reads them, in its strict form: what it has to guess is refused.
"""

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from tinyllama.data.conversations import Kind, expected, kind_of
from tinyllama.system.untrusted import printable

_DELIMITERS = {"csv": ",", "tsv": "\t"}


class TableError(ValueError):
    """A row that cannot be read, and the line that it begins in, from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def row_ends(file: BinaryIO, kind: str, longest: int) -> Iterator[int]:
    """The byte behind each row of a table, its header among them. A row may span lines.

    Raises TableError, also for a row of more than `longest` bytes.
    """
    at = begin = 0
    number = 1

    def lines() -> Iterator[str]:
        nonlocal at
        while line := file.readline(longest + 1):
            at += len(line)
            if at - begin > longest:
                raise TableError(
                    f"a row is longer than {longest} bytes; is a quote missing?", number
                )
            # Only to find the ends: within UTF-8, no byte of another character looks like ASCII.
            yield line.decode("latin-1")

    reader = _reader(lines(), kind)
    while True:
        try:
            if next(reader, None) is None:
                return
        except csv.Error as error:
            raise TableError(f"not valid CSV: {error}", number) from None
        yield at
        begin, number = at, reader.line_num + 1


def columns(header: bytes, kind: str) -> tuple[list[str], Kind]:
    """The names of the columns, and the kind of the rows. Raises TableError if it is none."""
    names: list[str] = next(_reader(io.StringIO(header.decode(), newline="\n"), kind), [])
    rows = kind_of(set(names))
    if rows is None:
        listed = ", ".join(printable(repr(name), 40) for name in names[:8]) or "none"
        hint = f'name the column that holds the text "text" (or columns {expected("prompt")})'
        raise TableError(f'no column "text"; columns: {listed}; {hint}', 1)
    return names, rows


def rows(data: str, kind: str, names: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, values by column) of rows without their header. Raises TableError."""
    reader = _reader(io.StringIO(data, newline="\n"), kind)
    line = 1
    for row in reader:
        if row and len(row) != len(names):  # a blank line has no columns
            advice = "put a text with commas or line ends between double quotes"
            raise TableError(f"{len(row)} columns, the header has {len(names)}: {advice}", line)
        if row:
            yield line, dict(zip(names, row, strict=True))
        line = reader.line_num + 1


def _reader(lines: Iterator[str], kind: str) -> Any:
    csv.field_size_limit(1 << 30)  # rows are limited, in bytes
    return csv.reader(lines, delimiter=_DELIMITERS[kind], strict=True)
