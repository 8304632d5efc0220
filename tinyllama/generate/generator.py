"""Text from a model, one token at a time, with a cache of keys and values.

The prompt is read in chunks of PROMPT_CHUNK tokens and continued one token at a time. That takes
two compiled graphs for all lengths; a layer is scheduled once per graph (runtime/stage.py).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.errors import ConfigError
from tinyllama.generate.sampling import Sampling, sample
from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Block, Function, Llama
from tinyllama.runtime.capture import captured
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import Inputs, alias

__all__ = ["PROMPT_CHUNK", "Generator", "Sampling"]

PROMPT_CHUNK = 32


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
        self._table = model.rotations(self._slots, self.length)
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
        model, table, caches = self.model, self._table, iter(self._caches)

        def turns() -> list[Tensor]:
            index = position + Tensor.arange(tokens.shape[1], device=tokens.device)
            return [part[index].contiguous() for part in table]

        cos, sin = self._stage([*table, position], turns, ("turns", tokens.shape[1]))

        def through(block: Block, x: Tensor) -> Tensor:
            return self._run_part(Block.cached, block, x, cos, sin, next(caches), position)

        x, weight = model.walk(tokens, through, self._run_part), model.head_weight()
        return self._stage([x, weight], lambda: [in_memory(model.head(x))], "head")[0]

    def _run_part(self, function: Function, module: Any, *inputs: Tensor) -> Tensor:
        """function(module, *inputs), scheduled once for all modules of its structure."""

        def build() -> list[Tensor]:
            # Other Tensors of the same memory: assigning to a cache would change the one given.
            return [in_memory(function(module, *(alias(part) for part in inputs)))]

        weights = [tensor for _, tensor in named_tensors(module)]
        key = (function.__qualname__, structure(module))
        return self._stage([*inputs, *weights], build, key)[0]
