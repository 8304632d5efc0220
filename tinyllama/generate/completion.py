"""A text that is being continued: draws tokens, and gives out the text that is certain.

Text is certain when its characters are whole and no stop string may begin in it: stop strings are
searched in the text, so that it does not matter where tokens end.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.errors import ConfigError
from tinyllama.generate.generator import Generator, check_length
from tinyllama.generate.sampling import Sampling, sample
from tinyllama.tokenizers.tokenizer import Tokenizer


class Made(NamedTuple):
    """What one token added: its id, None for the one that ends the text, and the text that is
    certain with it. logprobs: ln p of every token, before temperature, where they are wanted."""

    token: int | None
    text: str
    logprobs: npt.NDArray[np.float64] | None = None


class StopStrings:
    """Holds text back until no stop string can begin in it; ends before the first of them."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Raises ConfigError for an empty one."""
        if "" in stop:
            raise ConfigError("stop: got an empty string, must hold a character or more")
        self._stop, self._held = tuple(stop), ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain once `text` has come."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for stop in self._stop if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What is held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0


class Completion:
    """The continuation of a prompt: `advance` with the logits that follow `text` until
    finish_reason is "stop" or "length"."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        *,
        continued: bool = True,
        logprobs: bool = False,
        ends: Sequence[int] | None = None,
    ) -> None:
        """Up to new_tokens ids after `prompt`, ending before an id in `ends` (by default the
        tokenizer's) or one of the strings `stop`. `continued`: the text goes on within a text, so
        that a space before its first word is kept."""
        self.text = [*prompt]
        self.prompt_tokens, self._limit = len(prompt), len(prompt) + new_tokens
        self._vocabulary = tokenizer.vocab_size
        self._ends = frozenset(tokenizer.eos_ids if ends is None else ends)
        self._sampling, self._random = sampling, sampling.random()
        self._decoder = tokenizer.stream(continued=continued)
        self._stop, self._logprobs = StopStrings(stop), logprobs
        self.finish_reason: str | None = None

    @property
    def limit(self) -> int:
        """The most tokens to make."""
        return self._limit - self.prompt_tokens

    @property
    def made(self) -> int:
        """How many tokens the text has grown by."""
        return len(self.text) - self.prompt_tokens

    def advance(self, logits: npt.NDArray[np.float32]) -> Made:
        """Draw the next token from `logits` (vocab,), those after `text`.

        Raises WeightsError where they are not finite.
        """
        visible = logits[: self._vocabulary]
        token = sample(visible, self._sampling, self._random, self.text)
        logprobs = log_softmax(visible) if self._logprobs else None
        if token in self._ends:
            self.finish_reason = "stop"
            return Made(None, self._rest(), logprobs)
        self.text.append(token)
        text = self._stop.push(self._decoder.push(token))
        if self._stop.found:
            self.finish_reason = "stop"
        elif len(self.text) == self._limit:
            self.finish_reason = "length"
            text += self._rest()
        return Made(token, text, logprobs)

    def _rest(self) -> str:
        return self._stop.push(self._decoder.flush()) + self._stop.flush()

    def run(self, generator: Generator) -> Iterator[str]:
        """The text, piece by piece as it is made.

        Raises ConfigError if the prompt is empty or does not fit the context.
        """
        check_length(self.prompt_tokens, self.limit, generator.length)
        while self.finish_reason is None:
            chunks = generator.reading(self.text)
            logits = next(chunks)
            for later in chunks:
                yield ""  # a long prompt is read in parts, between which a caller may stop
                logits = later
            yield self.advance(logits).text


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """ln p of every token, from logits (vocab,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
