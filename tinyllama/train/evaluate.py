"""Held-out loss, perplexity and bits per byte of a model on text.

    loss = mean over tokens of -ln p(token | the tokens before it in its window and document)
    perplexity = exp(loss);  bits per byte = summed loss / (ln 2 * UTF-8 bytes of the text)

Bits per byte counts the bits for the ends of documents too, and does not depend on the
tokenizer, so it can be compared with a compressor's.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tinyllama.data.batches import Layout, TokenDataset, layout_of, sequential
from tinyllama.model.llama import Llama
from tinyllama.runtime.capture import captured
from tinyllama.runtime.storage import Inputs
from tinyllama.system.progress_bar import progress_bar
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.losses import Loss


class Evaluation(NamedTuple):
    """loss in nats per token; bits per byte of text; tokens predicted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


class PairEvaluation(NamedTuple):
    """Mean loss of a pair, and means of what else the loss measures, by name."""

    loss: float
    measures: Mapping[str, float]


class PairEvaluator:
    """Evaluates a model on pairs of answers, any number of times, with one compiled graph."""

    def __init__(self, model: Llama, loss: Loss, layout: Layout, batch_size: int) -> None:
        self.loss, self.layout, self.batch_size = loss, layout, batch_size
        self._inputs = Inputs()
        self._summed_loss = captured(StagedLoss(model, loss=loss).loss)

    def run(self, *, stopping: Callable[[], int] = lambda: 0) -> PairEvaluation | None:
        """Every pair once. Returns None if `stopping` became true before the end."""
        totals, pairs = np.zeros(1 + len(self.loss.measures)), 0
        for first in range(0, self.layout.n_rows, self.batch_size):
            if stopping():
                return None
            numbers = np.arange(first, min(first + self.batch_size, self.layout.n_rows))
            batch = self.layout.batch(numbers, self.batch_size)
            totals += self._summed_loss(*self._inputs(*batch)).numpy()
            pairs += self.loss.count(batch)
        loss, *measured = (totals / max(pairs, 1)).tolist()
        return PairEvaluation(loss, dict(zip(self.loss.measures, measured, strict=True)))


class Evaluator:
    """Evaluates a model on one text, any number of times, with one compiled graph."""

    def __init__(
        self,
        model: Llama,
        dataset: TokenDataset,
        context_length: int,
        batch_size: int,
        stride: int | None = None,
    ) -> None:
        self.model, self.dataset = model, dataset
        self.context_length, self.batch_size = context_length, batch_size
        self.stride = stride or context_length
        self._inputs = Inputs()
        self._summed_loss = captured(StagedLoss(model).loss)

    def run(
        self, *, progress: bool = False, stopping: Callable[[], int] = lambda: 0
    ) -> Evaluation | None:
        """Every token of the text once, in windows of context_length, `stride` tokens apart.

        Returns None if `stopping` became true before the end.
        """
        total, tokens = 0.0, 0
        shape = self.context_length, self.batch_size, self.stride
        windows = layout_of(self.dataset, self.context_length, stride=self.stride).n_rows
        with progress_bar(windows, "Evaluating", "window", shown=progress) as bar:
            for batch in sequential(self.dataset, *shape):
                if stopping():
                    return None
                total += float(self._summed_loss(*self._inputs(*batch)).item())
                tokens += int((batch.targets >= 0).sum())
                bar.update(min(self.batch_size, windows - bar.n))
        loss = total / max(tokens, 1)
        bits_per_byte = total / math.log(2) / max(self.dataset.text_bytes, 1)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, bits_per_byte, tokens)
