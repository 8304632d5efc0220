"""The next tokens of a text, with a cache of the keys and values of all tokens so far.

The prompt is read in chunks of LONG_CHUNK tokens, its rest in chunks of PROMPT_CHUNK, and continued
one token at a time. That takes three compiled graphs at most for all lengths; a layer is scheduled
once per graph (runtime/stage.py).

    Decoder      the graphs and the cache of B sequences: ids in, logits out
    Generator    one sequence: a prompt in, the ids that follow it out

What a cache holds is kept: of the next prompt only the tokens behind the longest common beginning
are computed. batch.py continues several sequences at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.errors import ConfigError
from tinyllama.generate.sampling import Sampling, sample
from tinyllama.model.layers import named_tensors, structure
from tinyllama.model.llama import Block, Function, Llama
from tinyllama.ops.cached_attention import LANES, Cache, new_cache
from tinyllama.ops.embedding import embedding
from tinyllama.runtime.capture import captured
from tinyllama.runtime.kernel import in_memory
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import Inputs, NumpyArray, alias, read, write

__all__ = ["PROMPT_CHUNK", "Decoder", "Draw", "Generator", "Sampling", "common_length"]

PROMPT_CHUNK, LONG_CHUNK = 32, 256

Logits = npt.NDArray[np.float32]
# Keys and values of each layer in turn, as they lie in its cache.
Saved = list[NumpyArray]


class Draw(NamedTuple):
    """A token that was drawn, and the logits (vocab,) it was drawn from."""

    token: int
    logits: Logits


class Decoder:
    """The forward pass of one model over a cache, for `sequences` of at most `length` tokens."""

    def __init__(self, model: Llama, length: int, sequences: int = 1) -> None:
        config = model.config
        self.model, self.length, self.sequences = model, length, sequences
        self._slots = -(-length // LANES) * LANES
        self._stage, self._inputs = Stage(), Inputs()
        self._table = model.rotations(self._slots, length)
        self.caches: list[Cache] = [
            new_cache(config.kv_heads, self._slots, config.head_dim, model.dtype, sequences)
            for _ in range(config.num_layers)
        ]
        self._graphs: dict[tuple[int, int, int], Any] = {}
        self.computed = 0  # tokens, without padding

    def read(self, tokens: Sequence[int], position: int, size: int = 1) -> Logits:
        """Logits (vocab,) that follow `tokens`, at most `size`, the first at `position` of the
        first sequence."""
        padded = [*tokens, *[0] * (size - len(tokens))]
        self.computed += len(tokens)
        logits: Logits = self._run([padded], [position], [[len(tokens) - 1]])[0]
        return logits

    def read_rows(self, tokens: Sequence[int], position: int, size: int) -> Logits:
        """As `read`, logits (T, vocab) that follow each of the tokens."""
        padded = [*tokens, *[0] * (size - len(tokens))]
        self.computed += len(tokens)
        return self._run([padded], [position], [[*range(size)]])[: len(tokens)]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Logits (B, vocab) that follow one token of each of the first B sequences."""
        self.computed += len(tokens)
        return self._run([[*tokens]], [*positions], [[0]])

    def compile(self, *sizes: int) -> None:
        """Compile the graphs for so many tokens, while the cache holds nothing."""
        for size in sizes:
            self._run([[0] * size], [0], [[0]])

    def compile_step(self, rows: int) -> None:
        """Compile the graph for one token of so many sequences, while the cache holds nothing."""
        self._run([[0] * rows], [0] * rows, [[0]])

    def saved(self, sequence: int, count: int) -> Saved:
        """A copy of the keys and values of a sequence's first `count` tokens."""
        return [read(part)[place].copy() for part, place in self._places(sequence, count)]

    def restore(self, sequence: int, count: int, saved: Saved) -> None:
        """Put keys and values of `count` tokens, as `saved` gives them, into a sequence."""
        for (part, place), values in zip(self._places(sequence, count), saved, strict=True):
            if part.device == "CPU":
                read(part)[place] = values
            else:
                whole = read(part).copy()
                whole[place] = values
                write(part, whole)

    def _places(self, sequence: int, count: int) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
        """The caches' tensors, and where in each the sequence's first `count` tokens lie."""
        heads = self.model.config.kv_heads
        mine = slice(sequence * heads, (sequence + 1) * heads)
        for cache in self.caches:
            yield cache.keys, (mine, slice(-(-count // LANES)))
            yield cache.values, (mine, slice(count))

    def _run(self, tokens: list[list[int]], positions: list[int], last: list[list[int]]) -> Logits:
        key = len(tokens[0]), len(positions), len(last[0])
        if key not in self._graphs:
            self._graphs[key] = captured(self._forward)
        numbers = tokens, positions, last
        inputs = self._inputs(*(np.array(part, np.int32) for part in numbers))
        logits: Logits = self._graphs[key](*inputs).numpy()[0]
        return logits

    def _forward(self, tokens: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """Logits (1, L, vocab) after the tokens `last` (1, L) of tokens (1, T), which stand at
        positions position, position + 1, ...; or (1, T, vocab) after each of T sequences, whose
        tokens stand at position (T,)."""
        model, table, caches = self.model, self._table, iter(self.caches)
        T, B = tokens.shape[1], position.shape[0]

        def turns() -> list[Tensor]:
            ahead = Tensor.arange(T, device=tokens.device)
            index = (position if B > 1 else position + ahead).reshape(1, T)
            return [in_memory(embedding(index, part, part.dtype)[0]) for part in table]

        cos, sin = self._stage([*table, position], turns, ("turns", T))

        def through(block: Block, x: Tensor) -> Tensor:
            return self._run_part(Block.cached, block, x, cos, sin, *next(caches), position)

        every = T == B

        def head() -> list[Tensor]:
            rows = x if every else embedding(last, x[0], x.dtype)
            return [in_memory(model.head(rows))]

        x = model.walk(tokens, through, self._run_part)
        weights = [tensor for _, tensor in named_tensors(model.head_layer())]
        given = [x, *weights] if every else [x, *weights, last]
        return self._stage(given, head, ("head", T, last.shape[1]))[0]

    def _run_part(self, function: Function, module: Any, *inputs: Tensor) -> Tensor:
        """function(module, *inputs), scheduled once for all modules of its structure."""

        def build() -> list[Tensor]:
            # Other Tensors of the same memory: assigning to a cache would change the one given.
            return [in_memory(function(module, *(alias(part) for part in inputs)))]

        weights = [tensor for _, tensor in named_tensors(module)]
        key = (function.__qualname__, structure(module))
        return self._stage([*inputs, *weights], build, key)[0]


class Generator:
    """Generates from one model; its compiled graphs serve every prompt."""

    def __init__(
        self, model: Llama, length: int | None = None, vocabulary: int | None = None
    ) -> None:
        """`length` bounds prompt and new tokens together; by default the model's own limit.

        With `vocabulary` only ids below it are drawn: a model may have more than its tokenizer.
        """
        self.length = min(length or model.config.max_seq_len, model.config.max_seq_len)
        self.model, self.vocabulary = model, vocabulary
        self.decoder = Decoder(model, self.length)
        self.held: list[int] = []  # the tokens whose keys and values the cache holds

    def compile(self) -> None:
        """Compile all graphs at once, instead of each when it is first needed."""
        self.held.clear()
        self.decoder.compile(1, PROMPT_CHUNK, LONG_CHUNK)

    def tokens(
        self, prompt: Sequence[int], new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        """Up to new_tokens ids that follow `prompt`, ending before an id in `stop`.

        Raises ConfigError if the prompt is empty or does not fit the model's context.
        """
        for draw in self.draws(prompt, new_tokens, sampling):
            if draw.token in stop:
                return
            yield draw.token

    def draws(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> Iterator[Draw]:
        """As `tokens`, whatever the tokens are, each with its logits."""
        check_length(len(prompt), new_tokens, self.length)
        random, text = sampling.random(), [*prompt]
        logits = self.follow(prompt)
        for made in range(new_tokens):
            if made:
                logits = self.follow(text)
            visible = logits[: self.vocabulary]
            token = sample(visible, sampling, random, text)
            text.append(token)
            yield Draw(token, visible)

    def follow(self, text: Sequence[int]) -> Logits:
        """Logits (vocab,) that follow `text`, of which the cache may hold a beginning."""
        *_, logits = self.reading(text)
        return logits

    def reading(self, text: Sequence[int]) -> Iterator[Logits]:
        """As `follow`, chunk by chunk; the last logits are those after the whole text.

        Padding of the last chunk writes cache slots past the text, which the tokens to come
        overwrite before anything attends to them.
        """
        start = min(common_length(self.held, text), len(text) - 1)
        while start < len(text):
            left = len(text) - start
            size = 1 if left == 1 else PROMPT_CHUNK
            if left > LONG_CHUNK - PROMPT_CHUNK:
                size = LONG_CHUNK
            chunk = text[start : start + size]
            del self.held[start:]  # also if this is interrupted
            logits = self.decoder.read(chunk, start, size)
            self.held += chunk
            start += len(chunk)
            yield logits

    def following(self, text: Sequence[int], first: int) -> Iterator[Logits]:
        """Logits (vocab,) after each token of `text` from number `first` on."""
        if common_length(self.held, text) < first:
            self.follow(text[:first])
        for start in range(first, len(text), PROMPT_CHUNK):
            chunk = text[start : start + PROMPT_CHUNK]
            del self.held[start:]
            rows = self.decoder.read_rows(chunk, start, PROMPT_CHUNK)
            self.held += chunk
            yield from rows


def check_length(prompt: int, new_tokens: int, length: int) -> None:
    """Raise ConfigError where a prompt is empty, or does not fit a context with its new tokens."""
    if not prompt:
        raise ConfigError("the prompt holds no token")
    if prompt + new_tokens > length:
        raise ConfigError(
            f"{prompt} prompt tokens and {new_tokens} new ones are more than the "
            f"{length} tokens of context"
        )


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    if one == other[: len(one)]:  # at once, as for every token of an answer
        return len(one)
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
