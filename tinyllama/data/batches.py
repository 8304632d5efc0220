"""Tokens -> packed, masked, resumable batches.

    prepare      texts -> TokenDataset, see corpus.py
    Batches      windows of it, shuffled anew each epoch, with a position that can be saved
    sequential   the same windows in order, once, for evaluation

Window w of T tokens holds tokens w*T to w*T+T-1; the target of each is the token behind it. The
last token of a document has no target, so that no document is predicted from another.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.data.corpus import TokenDataset, prepare
from tinyllama.errors import DataError
from tinyllama.system.json_files import short

__all__ = ["Batch", "Batches", "TokenDataset", "prepare", "sequential"]

_MOST_EPOCHS = 1 << 53

Int32 = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """`targets` is -1 where nothing is trained: at a document's end, and in padding.
    `starts` is the index in the row where the token's document begins: token t may attend to s
    with starts[t] <= s <= t."""

    tokens: Int32  # (B, T)
    targets: Int32  # (B, T)
    starts: Int32  # (B, T)


class Batches:
    """Endless batches of (batch_size, context_length) windows, each window once per epoch.

    The order depends on the seed and the epoch alone. Where an epoch does not fill its last batch,
    that is padded with rows without targets; the last window of the text is padded likewise.
    Raises DataError if the text is shorter than one context.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        context_length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if dataset.n_tokens < context_length:
            raise DataError(
                f"{dataset.name}: {dataset.n_tokens} tokens in all, fewer than one context of"
                f" {context_length}: more text or a smaller data.context_length"
            )
        self._dataset = dataset
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self.n_windows = dataset.window_count(context_length)
        self._order: npt.NDArray[np.int64] | None = None
        self._window = 0  # windows of this epoch that are done
        self.epoch = 0  # of the next batch, from 0: the epochs that are done
        self.steps_per_epoch = -(-self.n_windows // batch_size)
        self._last = np.zeros(0, np.int64)  # the windows of the batch that `next` gave

    def next(self) -> Batch:
        """The next batch; after an epoch's last one, `epoch` has grown by one."""
        self.skip()
        begins = self._last * self._context_length
        return _make_batch(self._dataset, begins, self._context_length, self._batch_size)

    def skip(self) -> None:
        """Go past the next batch as if it had been given."""
        if self._order is None:
            self._order = self._make_order()
        windows = self._order[self._window : self._window + self._batch_size]
        self._window += len(windows)
        if self._window == self.n_windows:
            self.epoch, self._window, self._order = self.epoch + 1, 0, None
        self._last = windows

    def documents(self) -> npt.NDArray[np.int64]:
        """The documents that the last batch held tokens of, by their index in the text; sorted."""
        starts, context = self._dataset.starts, self._context_length
        begins = self._last * context
        first = np.searchsorted(starts, begins, side="right") - 1
        last = np.searchsorted(starts, begins + context, side="left")
        held = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        return np.unique(np.concatenate(held)) if held else np.zeros(0, np.int64)

    def state(self) -> dict[str, int | str | bool]:
        """The position, as plain values for JSON."""
        return {**self._identity(), "epoch": self.epoch, "window": self._window}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the batch size may differ, since windows are counted.

        Raises DataError, naming what differs, if the text, the tokenizer, the context length or
        the shuffling differs.
        """
        for key, ours in self._identity().items():
            if key not in state or state[key] != ours:
                found = short(repr(state.get(key)), 80)
                difference = f"its {key} is {found}, here it is {ours!r}"
                if key == "data":  # a digest would not help the user
                    difference = "it was trained on a different text or with a different tokenizer"
                raise DataError(
                    f"{self._dataset.name}: cannot continue from the checkpoint: {difference}"
                )
        epoch, window = state.get("epoch"), state.get("window")
        shown = short(repr(state))
        if type(epoch) is not int or type(window) is not int:
            raise DataError(f"the checkpoint holds no position in the data: {shown}")
        if not 0 <= epoch < _MOST_EPOCHS or not 0 <= window < self.n_windows:
            raise DataError(f"the checkpoint's position is not in the data: {shown}")
        self.epoch, self._window, self._order = epoch, window, None

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "data": self._dataset.path.name,
            "context_length": self._context_length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def _make_order(self) -> npt.NDArray[np.int64]:
        """Windows in this epoch's order; 16 bytes per window. Sorted by the generator's raw bits:
        numpy promises those for all its versions, but not what permutation() makes of them."""
        if not self._shuffle:
            return np.arange(self.n_windows)
        generator = np.random.PCG64(np.random.SeedSequence([self._seed, self.epoch]))
        return np.argsort(generator.random_raw(self.n_windows), kind="stable")


def sequential(
    dataset: TokenDataset, context_length: int, batch_size: int, stride: int | None = None
) -> Iterator[Batch]:
    """Every token that has a target, once, in order; the last batch is padded to its full size.

    Windows begin `stride` tokens apart. With a stride below the context they overlap, and a
    window's targets are those that no window before it has: each has context_length - stride
    tokens before it at least, where the text has them.
    """
    stride = stride or context_length
    n_windows = dataset.window_count(context_length, stride)
    for first in range(0, n_windows, batch_size):
        windows = np.arange(first, min(first + batch_size, n_windows))
        batch = _make_batch(dataset, windows * stride, context_length, batch_size)
        overlapping = slice(int(first == 0), None)  # all but the text's first window
        batch.targets[overlapping, : context_length - stride] = -1
        yield batch


def _make_batch(
    dataset: TokenDataset, begins: npt.NDArray[np.int64], context_length: int, batch_size: int
) -> Batch:
    """Windows that begin at these tokens as rows, filled up with padding: EOS that attends to
    itself alone."""
    rows = np.full((batch_size, context_length + 1), -1, np.int32)
    for row, begin in zip(rows, begins, strict=False):
        window = dataset.tokens[begin : begin + context_length + 1]
        row[: len(window)] = window
    tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()  # (B, T)
    is_padding = tokens < 0
    begin_of = np.zeros(rows.shape, bool)  # whether a document begins with this token
    for first, begin in zip(begin_of, begins, strict=False):
        low, high = np.searchsorted(dataset.starts, (begin, begin + context_length + 1))
        first[dataset.starts[low:high] - begin] = True
    targets[is_padding | begin_of[:, 1:]] = -1  # no document is predicted from another
    is_first = is_padding | begin_of[:, :-1]
    positions = np.arange(context_length, dtype=np.int32)
    starts = np.maximum.accumulate(np.where(is_first, positions, 0), axis=1).astype(np.int32)
    tokens[is_padding] = dataset.eos_id
    return Batch(tokens, targets, starts)
