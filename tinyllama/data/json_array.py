"""One JSON array of rows, read row by row: where each row ends, found without parsing it.

Only strings, brackets and commas matter for that. A row is checked when it is parsed.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK_BYTES = 1 << 16
_OUTER = re.compile(rb'["\[\]{},]')  # within the array
_INNER = re.compile(rb'["\[\]{}]')  # within a row
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # the rest of one, without its quote


class ArrayError(ValueError):
    """Not one JSON array; the message is the reason."""


class _Scanner:
    """Finds the commas of the outermost array and its closing bracket, block after block."""

    def __init__(self, depth: int) -> None:
        self.depth = depth  # open brackets
        self._in_string = False
        self._escaped = False  # the last block ended between a backslash and what it escapes

    def scan(self, block: bytes) -> Iterator[int]:
        """Positions of those commas and of the bracket, which is the last one."""
        at = int(self._escaped)
        self._escaped = False
        while at < len(block):
            if self._in_string:
                at = self._string_end(block, at)
                continue
            match = (_OUTER if self.depth <= 1 else _INNER).search(block, at)
            if match is None:
                return
            sign, at = match[0], match.end()
            if sign == b'"':
                self._in_string = True
            elif sign in b"[{":
                self.depth += 1
            elif sign in b"]}":
                self.depth -= 1
                if self.depth == 0:
                    yield at - 1
                    return
            elif self.depth == 1:
                yield at - 1

    def _string_end(self, block: bytes, at: int) -> int:
        """The position behind a string that goes on at `at`, or the block's end."""
        match = _STRING.match(block, at)
        assert match is not None  # it may be empty
        end = match.end()
        if end == len(block):
            return end
        self._in_string = block[end : end + 1] != b'"'
        self._escaped = self._in_string  # else it is the backslash that ends the block
        return end + 1


def row_ends(file: BinaryIO, longest: int) -> Iterator[int]:
    """For each row of the array in `file`, the byte behind its comma; for the last row the file's
    size. Raises ArrayError, also for a row of more than `longest` bytes."""
    scanner, at, last, rows = _Scanner(0), 0, 0, 1
    while block := file.read(_BLOCK_BYTES):
        for position in scanner.scan(block):
            if scanner.depth == 0:
                yield _size(file, block[position + 1 :])
                return
            last, rows = at + position + 1, rows + 1
            yield last
        at += len(block)
        if at - last > longest:
            raise ArrayError(f"row {rows} is longer than {longest} bytes")
    raise ArrayError(f"the JSON array does not end: the file stops within row {rows}")


def rows(data: bytes, is_first: bool) -> Iterator[tuple[int, bytes]]:
    """Rows in a part of the array that `row_ends` delimits, and where in it each begins.

    `is_first`: the part begins with the array's own bracket.
    """
    scanner = _Scanner(0 if is_first else 1)
    first = begin = data.index(b"[") + 1 if is_first else 0
    for end in scanner.scan(data):
        row = data[begin:end]
        is_empty_array = is_first and begin == first and scanner.depth == 0 and not row.strip()
        if not is_empty_array:
            yield begin + len(row) - len(row.lstrip()), row.strip()
        begin = end + 1


def _size(file: BinaryIO, rest: bytes) -> int:
    """The size of a file of which `rest` follows the array. Raises ArrayError if that is text."""
    while not rest.strip():
        rest = file.read(_BLOCK_BYTES)
        if not rest:
            return file.tell()
    raise ArrayError("more text follows the end of the JSON array")
