"""The next token, drawn from a model's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinyllama.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature).

    temperature 0 takes the likeliest; top_k keeps the k likeliest; top_p keeps the likeliest that
    together reach that probability (Holtzman et al. 2020); min_p keeps those that have at least
    that share of the likeliest one's probability. Before all of these, the logits of tokens that
    the text holds already are divided by repetition_penalty if they are positive, and multiplied by
    it if they are negative (Keskar et al. 2019), as in transformers.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: got {self.temperature}, must be finite and 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}, must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed: got {self.seed}, must be 0 or more")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p: got {self.min_p}, must be 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            got = f"repetition_penalty: got {self.repetition_penalty}"
            raise ConfigError(f"{got}, must be finite and above 0")

    def random(self) -> np.random.Generator:
        """What draws are made with: the same ones for the same seed."""
        return np.random.Generator(np.random.PCG64(self.seed))


def sample(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    generator: np.random.Generator,
    text: Sequence[int] = (),
) -> int:
    """Draw one id from logits (vocab,), which follow the ids `text`.

    Raises WeightsError where the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise WeightsError("the model's logits are not finite, so its weights are of no use")
    if sampling.repetition_penalty != 1 and len(text):
        logits = _penalized(logits, sampling.repetition_penalty, text)
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the likeliest down: however small the temperature is, that one stays finite.
    wide = logits.astype(np.float64)
    scaled = (wide - wide.max()) / max(sampling.temperature, 1e-300)
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    if sampling.top_p is not None:
        before = np.cumsum(probabilities) - probabilities
        kept = int((before < sampling.top_p).sum())  # the first always stays
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    if sampling.min_p is not None:
        kept = int((probabilities >= sampling.min_p * probabilities[0]).sum())
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(generator.choice(order, p=probabilities))


def _penalized(
    logits: npt.NDArray[np.float32], penalty: float, text: Sequence[int]
) -> npt.NDArray[np.float32]:
    seen = np.unique(np.fromiter(text, np.int64))
    seen = seen[seen < len(logits)]
    changed = logits.copy()
    values = logits[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        values = np.where(values > 0, values / penalty, values * penalty)
    most = np.finfo(np.float32).max  # an infinite one would make probabilities NaN
    changed[seen] = values.clip(-most, most)
    return changed
