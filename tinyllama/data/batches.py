"""Tokens -> packed, masked, resumable batches.

    prepare      texts -> TokenDataset, see corpus.py
    Batches      rows of it, shuffled anew each epoch, with a position that can be saved
    sequential   the same rows in order, once, for evaluation

layout.py says which tokens a row holds; the target of each is the token behind it. The last token
of a document has no target, so that no document is predicted from another.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllama.data.corpus import TokenDataset, prepare
from tinyllama.data.layout import Batch, Layout, Pieces, Rows, Windows
from tinyllama.data.spool import Spool
from tinyllama.errors import DataError
from tinyllama.system.untrusted import printable

__all__ = ["Batch", "Batches", "Layout", "Rows", "TokenDataset", "prepare", "sequential"]

_MOST_EPOCHS = 1 << 53
_SORTED_WINDOWS = 1 << 18


class Named(Protocol):
    """What rows are of: its name for errors, and a folder whose name is a digest of it."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...


class Batches:
    """Endless batches of (batch_size, context_length) rows, each row once per epoch.

    The order depends on the seed and the epoch alone. Where an epoch does not fill its last batch,
    that is padded with rows without targets; the last window of a text is padded likewise. `pack`:
    several documents may share a row. Raises DataError if a text is shorter than one context.
    """

    def __init__(
        self,
        dataset: TokenDataset | Named,
        context_length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        pack: bool = True,
        layout: Layout | None = None,
    ) -> None:
        """`layout` is for rows of something else than text, or with more in them."""
        if layout is None:
            assert isinstance(dataset, TokenDataset)
            layout = text_layout(dataset, context_length, pack)
        self.layout = layout
        self._dataset = dataset
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._pack = pack
        self.n_windows = self.layout.n_rows
        self._order: npt.NDArray[np.int64] | None = None
        self._window = 0  # windows of this epoch that are done
        self.epoch = 0  # of the next batch, from 0: the epochs that are done
        self.steps_per_epoch = -(-self.n_windows // batch_size)
        self._last = np.zeros(0, np.int64)  # the windows of the batch that `next` gave

    def next(self) -> Rows:
        """The next batch; after an epoch's last one, `epoch` has grown by one."""
        self.skip()
        return self.layout.batch(self._last, self._batch_size)

    def skip(self) -> None:
        """Go past the next batch as if it had been given."""
        if self._order is None:
            self._order = self._make_order()
        windows = self._order[self._window : self._window + self._batch_size]
        self._window += len(windows)
        if self._window == self.n_windows:
            self.epoch, self._window, self._order = self.epoch + 1, 0, None
        self._last = windows

    @property
    def is_text(self) -> bool:
        """Whether the documents are texts, each of a row or a file; not conversations or pairs."""
        return isinstance(self._dataset, TokenDataset) and self._dataset.trained is None

    def documents(self, places: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
        """The documents that the last batch held tokens of, or some of its rows (pairs: examples)
        by their places, by their index in the text; sorted."""
        rows = self._last if places is None else self._last[list(places)]
        return self.layout.documents(rows)

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
                found = printable(repr(state.get(key)), 80)
                difference = f"its {key} is {found}, here it is {ours!r}"
                if key == "data":  # a digest would not help the user
                    difference = "it was trained on a different text or with a different tokenizer"
                raise DataError(
                    f"{self._dataset.name}: cannot continue from the checkpoint: {difference}"
                )
        epoch, window = state.get("epoch"), state.get("window")
        shown = printable(repr(state))
        if type(epoch) is not int or type(window) is not int:
            raise DataError(f"the checkpoint holds no position in the data: {shown}")
        if not 0 <= epoch < _MOST_EPOCHS or not 0 <= window < self.n_windows:
            raise DataError(f"the checkpoint's position is not in the data: {shown}")
        self.epoch, self._window, self._order = epoch, window, None

    def _identity(self) -> dict[str, int | str | bool]:
        identity: dict[str, int | str | bool] = {
            "data": self._dataset.path.name,
            "context_length": self._context_length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }
        return identity if isinstance(self.layout, Windows) else identity | {"pack": self._pack}

    def _make_order(self) -> npt.NDArray[np.int64]:
        """Windows in this epoch's order."""
        if not self._shuffle:
            return np.arange(self.n_windows)
        seed = np.random.SeedSequence([self._seed, self.epoch])
        order = shuffled(self.n_windows, seed, self._dataset.path.parent)
        if self._pack or not isinstance(self.layout, Pieces):
            return order
        generator = np.random.PCG64(seed).advance(self.n_windows)  # behind the order's numbers
        return self.layout.by_length(order, lambda count: generator.random_raw(count))


def shuffled(
    count: int, seed: np.random.SeedSequence, folder: Path, most: int = _SORTED_WINDOWS
) -> npt.NDArray[np.int64]:
    """The numbers 0 to count - 1, sorted by the generator's raw bits: numpy promises those for all
    its versions, but not what permutation() makes of them.

    Up to about `most` are sorted at once: those whose bits lie in one part of the range, for which
    all bits are drawn again. So memory does not grow with `count`; the order lies in `folder`.
    """
    n_parts = -(-count // most) or 1
    bounds = [(part << 64) // n_parts for part in range(n_parts + 1)]
    order = Spool(folder, "int64")
    for low, high in pairwise(bounds):
        generator, keys, numbers = np.random.PCG64(seed), [], []
        for first in range(0, count, most):
            drawn = generator.random_raw(min(most, count - first))
            (inside,) = np.nonzero((drawn >= np.uint64(low)) & (drawn <= np.uint64(high - 1)))
            keys.append(drawn[inside])
            numbers.append(first + inside)
        if keys:
            by_key = np.argsort(np.concatenate(keys), kind="stable")
            order.append(np.concatenate(numbers)[by_key])
    return order.array()


def sequential(
    dataset: TokenDataset, context_length: int, batch_size: int, stride: int | None = None
) -> Iterator[Batch]:
    """Every token that has a target, once, in order; the last batch is padded to its full size.

    Windows begin `stride` tokens apart. With a stride below the context they overlap, and a
    window's targets are those that no window before it has: each has context_length - stride
    tokens before it at least, where the text has them.
    """
    layout = layout_of(dataset, context_length, stride=stride)
    overlap = context_length - (stride or context_length)
    for first in range(0, layout.n_rows, batch_size):
        batch = layout.batch(np.arange(first, min(first + batch_size, layout.n_rows)), batch_size)
        overlapping = slice(int(first == 0), None)  # all but the text's first window
        batch.targets[overlapping, :overlap] = -1
        assert isinstance(batch, Batch)
        yield batch


def text_layout(dataset: TokenDataset, context_length: int, pack: bool) -> Layout:
    """The rows of a text that is trained. Raises DataError if it is shorter than one context."""
    layout = layout_of(dataset, context_length, pack)
    if isinstance(layout, Windows) and dataset.n_tokens < context_length:
        raise DataError(
            f"{dataset.name}: {dataset.n_tokens} tokens in all, fewer than one context of"
            f" {context_length}: more text or a smaller data.context_length"
        )
    return layout


def layout_of(
    dataset: TokenDataset, context_length: int, pack: bool = True, stride: int | None = None
) -> Layout:
    """The rows of a dataset. Raises DataError for a stride over conversations."""
    if pack and dataset.trained is None:
        return Windows(dataset, context_length, stride)
    if stride not in (None, context_length):
        raise DataError(
            f"{dataset.name}: holds conversations, whose rows do not overlap: no stride"
        )
    return Pieces(dataset, context_length, pack)
