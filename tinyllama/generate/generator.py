"""Text from a model, one token at a time, with a cache of keys and values.

The prompt is read in chunks of LONG_CHUNK tokens, its rest in chunks of PROMPT_CHUNK, and continued
one token at a time. That takes three compiled graphs at most for all lengths; a layer is scheduled
once per graph (runtime/stage.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.errors import ConfigError
from tinyllama.generate.sampling import Sampling, sample
from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Block, Function, Llama
from tinyllama.ops.cached_attention import LANES, new_cache
from tinyllama.ops.embedding import embedding
from tinyllama.runtime.capture import captured
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import Inputs, alias

__all__ = ["PROMPT_CHUNK", "Generator", "Sampling"]

PROMPT_CHUNK, LONG_CHUNK = 32, 256


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
        self._slots = -(-self.length // LANES) * LANES
        self.model, self.vocabulary, self._stage = model, vocabulary, Stage()
        self._table = model.rotations(self._slots, self.length)
        self._caches = [
            new_cache(config.kv_heads, self._slots, config.head_dim, model.dtype)
            for _ in range(config.num_layers)
        ]
        self._inputs = Inputs()
        self._graphs = {size: captured(self._forward) for size in (1, PROMPT_CHUNK, LONG_CHUNK)}

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
                logits = self._run([token], position)

    def _read_prompt(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits (vocab,) that follow the prompt. Padding of the last chunk writes cache slots
        past the prompt, which the tokens to come overwrite before anything attends to them."""
        start = 0
        while start < len(prompt):
            left = len(prompt) - start
            size = LONG_CHUNK if left > LONG_CHUNK - PROMPT_CHUNK else PROMPT_CHUNK
            logits = self._run(prompt[start : start + size], start, size)
            start += size
        return logits

    def _run(self, tokens: Sequence[int], position: int, size: int = 1) -> npt.NDArray[np.float32]:
        """Logits (vocab,) that follow `tokens`, at most `size`, the first at `position`."""
        padded = [*tokens, *[0] * (size - len(tokens))]
        numbers = [padded], [position], [[len(tokens) - 1]]
        inputs = self._inputs(*(np.array(part, np.int32) for part in numbers))
        logits: npt.NDArray[np.float32] = self._graphs[size](*inputs).numpy()[0, 0]
        return logits

    def _forward(self, tokens: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """Logits (1, 1, vocab) after the token `last` (1, 1) of tokens (1, T), which stand at
        positions position, position + 1, ..."""
        model, table, caches = self.model, self._table, iter(self._caches)
        T = tokens.shape[1]

        def turns() -> list[Tensor]:
            index = (position + Tensor.arange(T, device=tokens.device)).reshape(1, T)
            return [in_memory(embedding(index, part, part.dtype)[0]) for part in table]

        cos, sin = self._stage([*table, position], turns, ("turns", T))

        def through(block: Block, x: Tensor) -> Tensor:
            return self._run_part(Block.cached, block, x, cos, sin, *next(caches), position)

        def head() -> list[Tensor]:
            row = x if T == 1 else embedding(last, x[0], x.dtype)
            return [in_memory(model.head(row))]

        x = model.walk(tokens, through, self._run_part)
        weights = [tensor for _, tensor in named_tensors(model.head_layer())]
        given = [x, *weights] if T == 1 else [x, *weights, last]
        return self._stage(given, head, ("head", T))[0]

    def _run_part(self, function: Function, module: Any, *inputs: Tensor) -> Tensor:
        """function(module, *inputs), scheduled once for all modules of its structure."""

        def build() -> list[Tensor]:
            # Other Tensors of the same memory: assigning to a cache would change the one given.
            return [in_memory(function(module, *(alias(part) for part in inputs)))]

        weights = [tensor for _, tensor in named_tensors(module)]
        key = (function.__qualname__, structure(module))
        return self._stage([*inputs, *weights], build, key)[0]
