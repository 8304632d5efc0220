"""Which tokens stand in which row of a batch.

    Windows    text: row w holds tokens w*T to w*T+T-1, documents one after another, cut anywhere
    Pieces     conversations: each whole in one row, side by side with others or alone

A conversation longer than a row loses its end, which is counted; a text goes on in another row.
Either way a token attends to its own document alone, and no document is predicted from another.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tinyllama.data.corpus import TokenDataset
from tinyllama.data.spool import Spool, give_back

_PACKED_PIECES = 1 << 16  # are laid out together
_SORTED_ROWS = 4096
_BLOCK_ROWS = 64

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """`targets` is -1 where nothing is trained: at a document's end, in padding, and where a user
    speaks. `starts` is the index in the row where the token's document begins: token t may attend
    to s with starts[t] <= s <= t."""

    tokens: Int32  # (B, T)
    targets: Int32  # (B, T)
    starts: Int32  # (B, T)


class Rows(Protocol):
    """What every batch begins with, see Batch; it may hold more arrays of as many rows."""

    @property
    def tokens(self) -> Int32: ...

    @property
    def targets(self) -> Int32: ...

    @property
    def starts(self) -> Int32: ...

    def __iter__(self) -> Iterator[npt.NDArray[Any]]: ...


class Layout(Protocol):
    """Rows of T tokens over a dataset."""

    @property
    def n_rows(self) -> int:
        """How many there are."""

    def batch(self, rows: Int64, batch_size: int) -> Rows:
        """These rows, filled up to `batch_size` with padding: EOS that attends to itself alone."""

    def documents(self, rows: Int64) -> Int64:
        """The documents that these rows hold tokens of, by their index in the dataset; sorted."""

    def notices(self) -> list[str]:
        """One line for each kind of loss: what is cut off, what is left out."""


class Windows:
    """Rows that begin `stride` tokens apart, a row's own length if not given."""

    def __init__(
        self, dataset: TokenDataset, context_length: int, stride: int | None = None
    ) -> None:
        self._dataset, self._context_length = dataset, context_length
        self._stride = stride or context_length
        self.n_rows = dataset.window_count(context_length, stride)

    def batch(self, rows: Int64, batch_size: int) -> Batch:
        """See Layout."""
        dataset, context_length = self._dataset, self._context_length
        begins = rows * self._stride
        made = np.full((batch_size, context_length + 1), -1, np.int32)
        for row, begin in zip(made, begins, strict=False):
            window = dataset.tokens[begin : begin + context_length + 1]
            row[: len(window)] = window
        tokens, targets = made[:, :-1].copy(), made[:, 1:].copy()  # (B, T)
        is_padding = tokens < 0
        begin_of = np.zeros(made.shape, bool)  # whether a document begins with this token
        for first, begin in zip(begin_of, begins, strict=False):
            low, high = np.searchsorted(dataset.starts, (begin, begin + context_length + 1))
            first[dataset.starts[low:high] - begin] = True
        targets[is_padding | begin_of[:, 1:]] = -1  # no document is predicted from another
        is_first = is_padding | begin_of[:, :-1]
        positions = np.arange(context_length, dtype=np.int32)
        starts = np.maximum.accumulate(np.where(is_first, positions, 0), axis=1).astype(np.int32)
        tokens[is_padding] = dataset.eos_id
        return Batch(tokens, targets, starts)

    def documents(self, rows: Int64) -> Int64:
        """See Layout."""
        starts, begins = self._dataset.starts, rows * self._stride
        first = np.searchsorted(starts, begins, side="right") - 1
        last = np.searchsorted(starts, begins + self._context_length, side="left")
        held = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        return np.unique(np.concatenate(held)) if held else np.zeros(0, np.int64)

    def notices(self) -> list[str]:
        """Nothing is lost."""
        return []


class Pieces:
    """Rows of whole documents: as many as fit, or (`pack` false) one each.

    Documents are laid out in blocks, and what is known of each piece lies on disk, in the order of
    the rows, so that memory does not grow with the documents.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, pack: bool = True) -> None:
        self._dataset, self._context_length = dataset, context_length
        self.n_cut = self.n_dropped = self.n_rows = 0
        made = [Spool(dataset.path.parent, dtype) for dtype in ("int64", "int32", "bool", "int64")]
        n_pieces = 0
        for block in self._cut():
            lengths = block[1]
            row_of = _packed(lengths, context_length) if pack else np.arange(len(lengths))
            order = np.argsort(row_of, kind="stable")
            for spool, values in zip(made, block, strict=False):
                spool.append(values[order])
            n_rows = int(row_of.max(initial=-1)) + 1
            firsts = np.searchsorted(row_of[order], np.arange(n_rows))
            made[3].append(n_pieces + firsts)
            self.n_rows, n_pieces = self.n_rows + n_rows, n_pieces + len(lengths)
        made[3].append(np.array([n_pieces]))
        # Of each piece: its begin, its length, whether its document goes on in the next one. Of
        # each row: the number of its first piece.
        self._begins, self._lengths, self._goes_on, self._firsts = (s.array() for s in made)

    def batch(self, rows: Int64, batch_size: int) -> Batch:
        """See Layout."""
        shape = batch_size, self._context_length
        tokens = np.full(shape, self._dataset.eos_id, np.int32)
        targets = np.full(shape, -1, np.int32)
        starts = np.tile(np.arange(self._context_length, dtype=np.int32), (batch_size, 1))
        for number, row in enumerate(rows):
            at = 0
            for piece in range(self._firsts[row], self._firsts[row + 1]):
                length = int(self._lengths[piece])
                place = slice(at, at + length)
                tokens[number, place], targets[number, place] = self._piece(piece, length)
                starts[number, place] = at
                at += length
        return Batch(tokens, targets, starts)

    def by_length(self, order: Int64, draw: Callable[[int], npt.NDArray[Any]]) -> Int64:
        """The rows, of a piece each, in an order in which neighbours are of similar length: sorted
        in parts, which are cut into blocks, whose order is drawn anew. Depends on no batch size."""
        folder, lengths = self._dataset.path.parent, self._lengths
        ordered, drawn = Spool(folder, "int64"), Spool(folder, "int64")
        for at in range(0, len(order), _SORTED_ROWS):
            part = order[at : at + _SORTED_ROWS]
            ordered.append(part[np.argsort(lengths[part], kind="stable")])
        sorted_rows = ordered.array()
        whole = len(order) // _BLOCK_ROWS * _BLOCK_ROWS
        blocks = sorted_rows[:whole].reshape(-1, _BLOCK_ROWS)
        numbers = np.argsort(draw(len(blocks)), kind="stable")
        for at in range(0, len(numbers), _SORTED_ROWS):
            drawn.append(blocks[numbers[at : at + _SORTED_ROWS]])
        drawn.append(sorted_rows[whole:])
        return drawn.array()

    def documents(self, rows: Int64) -> Int64:
        """See Layout."""
        held = [self._begins[self._firsts[row] : self._firsts[row + 1]] for row in rows]
        begins = np.concatenate([np.zeros(0, np.int64), *held])
        return np.unique(np.searchsorted(self._dataset.starts, begins, side="right") - 1)

    def notices(self) -> list[str]:
        """Conversations that are cut, and those that nothing is trained of."""
        lines, name = [], self._dataset.name
        n_dropped, whole = self._dataset.n_dropped, self._dataset.n_documents
        if self.n_cut:
            lines.append(
                f"{name}: {self.n_cut} of {whole} conversations are longer than "
                f"{self._context_length} tokens: their ends are cut off (data.context_length)"
            )
        if dropped := self.n_dropped + n_dropped:
            lines.append(
                f"{name}: {dropped} of {whole + n_dropped} conversations have no token that is "
                "trained and are left out (data.train_on, data.context_length)"
            )
        return lines

    def _piece(self, piece: int, length: int) -> tuple[Int32, Int32]:
        """Tokens and targets of a piece."""
        begin = int(self._begins[piece])
        end = begin + length + int(self._goes_on[piece])
        tokens = np.asarray(self._dataset.tokens[begin:end], np.int32)
        targets = np.full(length, -1, np.int32)
        targets[: end - begin - 1] = tokens[1:]
        if self._dataset.trained is not None:
            is_trained = self._dataset.trained[begin + 1 : end] == 1
            targets[: end - begin - 1][~is_trained] = -1
        return tokens[:length], targets

    def _cut(self) -> Iterator[tuple[Int64, Int64, npt.NDArray[np.bool_]]]:
        """Begin and length of each piece, and whether its document goes on in the next one; in
        blocks of pieces."""
        dataset, longest = self._dataset, self._context_length
        for first in range(0, dataset.n_documents, _PACKED_PIECES):
            starts = np.asarray(dataset.starts[first : first + _PACKED_PIECES])
            end = first + _PACKED_PIECES
            behind = dataset.n_tokens if end >= dataset.n_documents else dataset.starts[end]
            lengths = np.diff(starts, append=behind)
            is_text = np.ones(len(starts), bool)
            if dataset.trained is not None:
                is_text = np.asarray(dataset.trained[starts]) == 1
                give_back(dataset.trained)  # a page for each document was read
            # The last token of a text has no target, so it needs no row of its own.
            parts = np.where(is_text, np.maximum(-(-(lengths - 1) // longest), 1), 1)
            cut = np.flatnonzero(~is_text & (lengths > longest))
            lost = [n for n in cut if not self._trains(int(starts[n]), longest)]
            parts[lost] = 0
            self.n_cut += len(cut) - len(lost)
            self.n_dropped += len(lost)
            ends = np.cumsum(parts)  # of the documents' pieces
            for at in range(0, int(ends[-1]), _PACKED_PIECES):
                pieces = np.arange(at, min(at + _PACKED_PIECES, int(ends[-1])))
                document = np.searchsorted(ends, pieces, side="right")
                begins = starts[document] + (pieces - (ends - parts)[document]) * longest
                left = (starts + lengths)[document] - begins
                goes_on = is_text[document] & (left > longest)
                yield begins, np.minimum(left, longest), goes_on

    def _trains(self, begin: int, length: int) -> bool:
        trained = self._dataset.trained
        return trained is None or bool((trained[begin + 1 : begin + length] == 1).any())


def trimmed_lengths(context_length: int) -> tuple[int, ...]:
    """The lengths of batches without padding: a quarter, half, and all of the context, for each of
    which a graph is compiled."""
    return tuple(sorted({-(-context_length // part) for part in (4, 2, 1)}))


def trimmed(batch: Rows) -> Rows:
    """The batch without the padding that all of its rows end with, as far as its length remains one
    of `trimmed_lengths`."""
    T = batch.tokens.shape[1]
    is_used = (batch.starts != np.arange(T, dtype=np.int32)) | (batch.targets >= 0)
    used = int(np.flatnonzero(is_used.any(axis=0)).max(initial=0)) + 1
    length = next(length for length in trimmed_lengths(T) if length >= used)
    if length == T:
        return batch
    make: Callable[..., Rows] = type(batch)
    parts = (a if a.ndim == 1 else a[:, :length] for a in batch)  # a number per row, or per token
    return make(*map(np.ascontiguousarray, parts))


def _packed(lengths: Int64, longest: int) -> Int64:
    """The row of each piece: the longest first, each into the row with the least room that is
    enough (best fit decreasing), the first such row."""
    rows_with: list[list[int]] = [[] for _ in range(longest + 1)]  # by the room that is left
    with_room = 0  # bit r: there is a row with r tokens left
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        fitting = with_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                with_room ^= 1 << room
        else:
            row, room, n_rows = n_rows, longest, n_rows + 1
        row_of[piece] = row
        if left := room - length:
            rows_with[left].append(row)
            with_room |= 1 << left
    return row_of
