"""Text from a model, a token at a time, with a cache of keys and values.

The prompt is read in chunks of PROMPT_CHUNK tokens and continued one token at a time: two
compiled graphs in all, whatever the lengths, and each of one layer, scheduled once and run for
every layer (ops/stage.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.errors import ConfigError, WeightsError
from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Block, Llama
from tinyllama.runtime.capture import captured
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import Inputs, alias

PROMPT_CHUNK = 32


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature).

    temperature 0 takes the likeliest; top_k keeps the k likeliest; top_p keeps the likeliest that
    together reach that probability (Holtzman et al. 2020).
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: got {self.temperature}, must be finite and 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}, must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed: got {self.seed}, must be 0 or more")


class Generator:
    """Generates from one model; its compiled graphs serve every prompt."""

    def __init__(
        self, model: Llama, length: int | None = None, vocabulary: int | None = None
    ) -> None:
        """`length` bounds prompt and new tokens together; by default the model's own limit.

        With `vocabulary` only ids below it are drawn: a model may have more than its tokenizer.
        """
        config = model.config
        self.length = min(length or config.max_seq_len, config.max_seq_len)
        self._slots = -(-self.length // PROMPT_CHUNK) * PROMPT_CHUNK
        shape = (2, 1, self._slots, config.kv_heads, config.head_dim)
        self.model, self.vocabulary, self._stage = model, vocabulary, Stage()
        self._caches = [
            Tensor.zeros(*shape, dtype=model.dtype).contiguous().realize()
            for _ in range(config.num_layers)
        ]
        self._inputs = Inputs()
        self._prompt, self._next = captured(self._forward), captured(self._forward)

    def tokens(
        self, prompt: Sequence[int], new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        """Up to new_tokens ids that follow `prompt`, ending before an id in `stop`.

        Raises ConfigError if the prompt is empty or does not fit the model's context.
        """
        if not prompt:
            raise ConfigError("the prompt holds no token")
        if len(prompt) + new_tokens > self.length:
            raise ConfigError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones are more than the "
                f"{self.length} tokens of context"
            )
        generator = np.random.Generator(np.random.PCG64(sampling.seed))
        logits = self._read_prompt(prompt)
        for position in range(len(prompt), len(prompt) + new_tokens):
            token = sample(logits[: self.vocabulary], sampling, generator)
            if token in stop:
                return
            yield token
            if position + 1 < len(prompt) + new_tokens:
                logits = self._run(self._next, [token], position)[0]

    def _read_prompt(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits (vocab,) that follow the prompt. Padding of the last chunk writes cache slots
        past the prompt, which the tokens to come overwrite before anything attends to them."""
        for start in range(0, len(prompt), PROMPT_CHUNK):
            part = list(prompt[start : start + PROMPT_CHUNK])
            padded = part + [0] * (PROMPT_CHUNK - len(part))
            logits: npt.NDArray[np.float32] = self._run(self._prompt, padded, start)[len(part) - 1]
        return logits

    def _run(
        self, graph: Callable[..., Tensor], tokens: list[int], position: int
    ) -> npt.NDArray[np.float32]:
        inputs = self._inputs(np.array([tokens], np.int32), np.array([position], np.int32))
        logits: npt.NDArray[np.float32] = graph(*inputs).numpy()[0]
        return logits

    def _forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits (1, T, vocab) of tokens (1, T) at positions position, position + 1, ..."""
        model, table = self.model, self.model.rotations(self._slots)
        embedding, norm, weight = model.model.embed_tokens, model.model.norm, model.head_weight()

        def turns() -> list[Tensor]:
            index = position + Tensor.arange(tokens.shape[1], device=tokens.device)
            return [part[index].contiguous() for part in table]

        def embedded() -> list[Tensor]:
            return [in_memory(model.embed(embedding, tokens))]

        cos, sin = self._stage([*table, position], turns, ("turns", tokens.shape[1]))
        x = self._stage([tokens, embedding.weight], embedded, "embedding")[0]
        for layer, cache in zip(model.model.layers, self._caches, strict=True):
            x = self._layer(layer, x, cos, sin, cache, position)

        def head() -> list[Tensor]:
            return [in_memory(model.head(norm(x)))]

        return self._stage([x, norm.weight, weight], head, "head")[0]

    def _layer(
        self, layer: Block, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, position: Tensor
    ) -> Tensor:
        """A layer's output (1, T, hidden); its cache is updated in place."""

        def build() -> list[Tensor]:
            # Another Tensor of the same memory: assigning to the cache itself would change it.
            return [in_memory(layer.cached(x, cos, sin, alias(cache), position))]

        weights = [tensor for _, tensor in named_tensors(layer)]
        return self._stage([x, cos, sin, cache, position, *weights], build, structure(layer))[0]


def sample(
    logits: npt.NDArray[np.float32], sampling: Sampling, generator: np.random.Generator
) -> int:
    """Draw one id from logits (vocab,). Raises WeightsError where they are not finite."""
    if not np.isfinite(logits).all():
        raise WeightsError("the model's logits are not finite, so its weights are of no use")
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
    return int(generator.choice(order, p=probabilities))
