"""What OpenAI's interface sends and receives: checked requests, and the objects of an answer."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from tinyllama.errors import ConfigError
from tinyllama.generate.completion import Made
from tinyllama.generate.conversation import checked_messages
from tinyllama.generate.sampling import Sampling
from tinyllama.tokenizers.tokenizer import Tokenizer

MOST_CHOICES = 8
MOST_STOPS = 16
MOST_LOGPROBS = 20


class StreamOptions(msgspec.Struct):
    """stream_options of a request."""

    include_usage: bool | None = None


class Wanted(msgspec.Struct, kw_only=True):
    """What both kinds of requests hold; a key that is absent or null is the server's default. Keys
    that are not here change nothing."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None

    def samplings(self, default: Sampling) -> list[Sampling]:
        """How each of the n choices is drawn. Raises ConfigError."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MOST_CHOICES:
            raise ConfigError(f"n: got {n}, must be 1 to {MOST_CHOICES}")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values: dict[str, Any] = {name: getattr(default, name) for name in names}
        values |= {name: given for name in names if (given := getattr(self, name)) is not None}
        seed = secrets.randbelow(1 << 31) if self.seed is None else self.seed
        return [Sampling(**values, seed=seed + number) for number in range(n)]

    def check(self) -> None:
        """Raise ConfigError for a value that is not allowed, whatever the model is."""
        self.samplings(Sampling())
        if len(self.stops) > MOST_STOPS:
            raise ConfigError(f"stop: got {len(self.stops)} strings, must be at most {MOST_STOPS}")
        if "" in self.stops:
            raise ConfigError("stop: got an empty string, must hold a character or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"max_tokens: got {self.limit}, must be 1 or more")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """The most tokens to make."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many alternatives each token is reported with; None for no probabilities."""
        return None

    @property
    def includes_usage(self) -> bool:
        """Whether the last event of a stream counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatWanted(Wanted, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        super().check()
        self.messages = checked_messages(self.messages)
        _check_top(self.top, "top_logprobs")

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionWanted(Wanted, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[int]
    logprobs: int | None = None
    echo: bool | None = None

    def check(self) -> None:
        super().check()
        _check_top(self.top, "logprobs")
        if self.echo:
            raise ConfigError("echo: got true, must be left out")

    @property
    def top(self) -> int | None:
        return self.logprobs


def _check_top(count: int | None, name: str) -> None:
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        raise ConfigError(f"{name}: got {count}, must be 0 to {MOST_LOGPROBS}")


AnyWanted = TypeVar("AnyWanted", bound=Wanted)


def parse_request(body: bytes, kind: type[AnyWanted]) -> AnyWanted:
    """The checked request that a body holds. Raises ConfigError."""
    try:
        wanted = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the request is no JSON: {error}") from None
    wanted.check()
    return wanted


def prompt_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """The prompt of a completion. Raises ConfigError for ids that the tokenizer does not have."""
    if isinstance(prompt, str):
        return [*tokenizer.begin, *tokenizer.encode(prompt, special=True)]
    if not all(0 <= number < tokenizer.vocab_size for number in prompt):
        raise ConfigError(f"prompt: its ids must be 0 to {tokenizer.vocab_size - 1}")
    return prompt


class Form:
    """The objects of one answer, whole or streamed, of a chat or a completion."""

    def __init__(self, model: str, tokenizer: Tokenizer, top: int | None, *, chat: bool) -> None:
        self._tokenizer, self._top, self._chat = tokenizer, top, chat
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": identity, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[tuple[list[Made], str]], usage: Any) -> dict[str, Any]:
        """The answer that is no stream: what was made of each choice, and why it ended."""
        kind = "chat.completion" if self._chat else "text_completion"
        made = []
        for index, (pieces, reason) in enumerate(choices):
            text = "".join(piece.text for piece in pieces)
            choice: dict[str, Any] = {"index": index, "finish_reason": reason}
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            made.append(choice | {"logprobs": self._logprobs(pieces)})
        return {**self._head, "object": kind, "choices": made, "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """The event that begins a choice, for a chat."""
        if not self._chat:
            return None
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, index: int, made: Made) -> dict[str, Any]:
        """The event of one piece."""
        body = {"delta": {"content": made.text}} if self._chat else {"text": made.text}
        return self._event(index, body, None, self._logprobs([made]))

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """The event that ends a choice."""
        body: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._event(index, body, reason, None)

    def usage(self, usage: Any) -> dict[str, Any]:
        """The event that counts tokens."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": usage}

    def _event(
        self, index: int, body: dict[str, Any], reason: str | None, logprobs: Any
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choice = {"index": index, **body, "finish_reason": reason, "logprobs": logprobs}
        return {**self._head, "object": kind, "choices": [choice]}

    def _logprobs(self, pieces: Sequence[Made]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        made = [piece for piece in pieces if piece.token is not None]
        if self._chat:
            return {"content": [self._chat_logprob(piece) for piece in made]}
        tokens = [self._text(piece.token) for piece in made]
        chosen = [self._of(piece, piece.token) for piece in made]
        top = [{self._text(n): self._of(p, n) for n in self._likeliest(p)} for p in made]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top}

    def _chat_logprob(self, made: Made) -> dict[str, Any]:
        top = [self._entry(made, number) for number in self._likeliest(made)]
        return {**self._entry(made, made.token), "top_logprobs": top}

    def _entry(self, made: Made, token: int | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": self._of(made, token), "bytes": list(text.encode())}

    def _likeliest(self, made: Made) -> list[int]:
        assert made.logprobs is not None
        order: list[int] = np.argsort(-made.logprobs, kind="stable")[: self._top].tolist()
        return order

    def _of(self, made: Made, token: int | None) -> float:
        assert made.logprobs is not None and token is not None
        return float(made.logprobs[token])

    def _text(self, token: int | None) -> str:
        assert token is not None
        decoder = self._tokenizer.stream(continued=True, special=True)
        return decoder.push(token) + decoder.flush()


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens of the prompt and of all choices."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
