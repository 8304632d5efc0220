"""Where the documents of a tokenized text came from: document -> file and row.

Tokens are kept without the names of their files, so that files can move. The rows of a file are
counted when a document of it is first looked for, which reads the file once.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama.data.corpus import Part
from tinyllama.data.files import Source, cut, find_sources, read_chunk
from tinyllama.data.spool import Spool


class Place(NamedTuple):
    """A file, and the row of it, from 1; None where the file is one document."""

    path: Path
    row: int | None

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path} row {self.row}"


class Places:
    """Finds the places of the texts of `patterns`, in the order of find_sources; of those in `part`
    if one is given."""

    def __init__(self, patterns: str | Sequence[str], part: Part | None = None) -> None:
        self._patterns, self._part = patterns, part
        self._sources: list[Source] = []
        self._firsts: list[int] = []  # of each source counted so far: its first document
        self._rows: list[np.ndarray | None] = []  # and the rows that hold text, from 1
        self._counted = 0  # documents in these

    def of(self, document: int) -> Place | None:
        """The place of a document by its index, from 0; None past the last one.

        Raises DataError where a file cannot be read any more.
        """
        if not self._sources:
            self._sources = find_sources(self._patterns)
        while self._counted <= document and len(self._rows) < len(self._sources):
            self._count(self._sources[len(self._rows)])
        if document >= self._counted:
            return None
        index = bisect_right(self._firsts, document) - 1
        while not self._holds(index):  # a file without text begins where the next one does
            index -= 1
        rows = self._rows[index]
        row = None if rows is None else int(rows[document - self._firsts[index]])
        return Place(self._sources[index].path, row)

    def _holds(self, index: int) -> bool:
        rows = self._rows[index]
        return rows is None or len(rows) > 0

    def _count(self, source: Source) -> None:
        self._firsts.append(self._counted)
        if not source.has_rows:
            is_document = any(text for chunk in cut(source) for text in read_chunk(chunk))
            self._rows.append(None if is_document else np.zeros(0, np.int64))
            self._counted += is_document
            return
        spool, before = Spool(None, "int64"), 1
        for chunk in cut(source):
            held = np.array([self._is_document(text) for text in read_chunk(chunk)], bool)
            spool.append(np.flatnonzero(held) + before)
            before += len(held)
        rows = spool.array()
        self._rows.append(rows)
        self._counted += len(rows)

    def _is_document(self, text: str) -> bool:
        return bool(text) and (self._part is None or self._part.holds(text.encode()))
