"""Text that is unlike the rest: a damaged file, another encoding, an attachment among prose.

    score(row) = -sum(log p(token)) / sum(characters of token)     over a row's trained tokens

p is how often a token occurs in a sample of the run's own text, a few times per row at most, so
that a damaged document in the sample does not make itself usual. Noise consists of short pieces
that are rare, so a row of it costs several times as much per character as any usual row, whatever
the model has learned. Compared by its logarithm with median and MAD of the sample, which follow
from the text alone: nothing of it is kept in a checkpoint.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.data.layout import Layout
from tinyllama.observe.anomalies import SIGMA

SCORE = 4.0  # standard deviations above the median that are unusual, where texts vary much
_LEAST = math.log(2.9)  # and how much above it in any case, as a factor: noise is 3 to 4.7
_MOST_PER_ROW = 4  # times that a token counts in a row of the sample
_SAMPLED_ROWS = 256
_FEW_TOKENS = 32  # a row with fewer says nothing
_FEW_ROWS = 32  # and so do fewer rows
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

Floats = npt.NDArray[np.float64]


class OddRow(NamedTuple):
    """A row of a batch, its nats per character, and what is usual."""

    row: int
    value: float
    usual: float


class TextWatch:
    """Knows how usual the text of a row is."""

    def __init__(self, layout: Layout, pieces: Sequence[str]) -> None:
        """`pieces` are what each token is called in the vocabulary."""
        count = min(layout.n_rows, _SAMPLED_ROWS)
        chosen = np.linspace(0, max(0, layout.n_rows - 1), count).astype(np.int64)
        targets = [layout.batch(chosen[at : at + 1], 1).targets for at in range(count)]
        trained = [row[row >= 0] for rows in targets for row in rows]
        size = max([len(pieces), *(int(row.max()) + 1 for row in trained if len(row))])
        self._lengths = np.ones(size)
        self._lengths[: len(pieces)] = [_characters(piece) for piece in pieces]
        seen = np.ones(size)
        for row in trained:
            seen += np.minimum(np.bincount(row, minlength=size), _MOST_PER_ROW)
        self._nats: Floats = -np.log(seen / seen.sum())
        scores = [score for row in trained if (score := self.score(row)) is not None]
        self.usual, self.limit = _usual_and_limit(scores)

    def score(self, targets: npt.NDArray[np.int32]) -> float | None:
        """Nats per character of a row's targets (T,); None where too few are trained."""
        tokens = targets[(targets >= 0) & (targets < len(self._nats))]
        if len(tokens) < _FEW_TOKENS:
            return None
        return float(self._nats[tokens].sum() / self._lengths[tokens].sum())

    def odd(self, targets: npt.NDArray[np.int32]) -> list[OddRow]:
        """The rows of targets (B, T) that are unlike the text."""
        if math.isinf(self.limit):
            return []
        scores = enumerate(map(self.score, targets))
        return [OddRow(i, x, self.usual) for i, x in scores if x is not None and x > self.limit]


def _characters(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else max(1, len(piece))


def _usual_and_limit(scores: Sequence[float]) -> tuple[float, float]:
    """The median, and the largest score that is not unusual; infinite where little is known."""
    if len(scores) < _FEW_ROWS:
        return math.nan, math.inf
    logs = np.log(np.maximum(scores, 1e-9))
    middle = float(np.median(logs))
    sigma = SIGMA * float(np.median(np.abs(logs - middle)))
    return math.exp(middle), math.exp(middle + max(SCORE * sigma, _LEAST))
