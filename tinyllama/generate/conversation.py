"""A conversation with a model: messages that grow by turns, and the prompt for the next answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, DataError
from tinyllama.generate.completion import Completion
from tinyllama.generate.generator import Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.system.files import atomic_write
from tinyllama.tokenizers.templates import NAMED, ChatTemplate, Message, named_template
from tinyllama.tokenizers.tokenizer import Tokenizer

__all__ = ["Conversation", "chat_template", "checked_messages", "fitting"]


def chat_template(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """The model's own template, or the one of NAMED that is called `name`.

    Raises ConfigError where the model has none, and DataError where its own is no template.
    """
    if name is not None:
        if name not in NAMED:
            raise ConfigError(f"--template: got {name!r}, must be one of {', '.join(NAMED)}")
        return named_template(name, tokenizer)
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the model has no chat template: name the one that it was trained with, "
            f"--template {'|'.join(NAMED)}"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer, "the model's chat template")


def fitting(
    template: ChatTemplate, messages: Sequence[Message], room: int
) -> tuple[list[int], list[Message]]:
    """Ids of at most `room` tokens, and the messages they are of: where all do not fit, the oldest
    turns are left out, never the system's.

    Raises ConfigError if the last message alone does not fit.
    """
    kept = [*messages]
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while True:
        ids = template.encode_prompt(kept)
        if len(ids) <= room:
            return ids, kept
        # A turn is a message of the user and all up to the next one.
        later = [n for n in range(first + 1, len(kept)) if kept[n]["role"] == "user"]
        if not later:
            raise ConfigError(
                f"the message is too long: {len(ids)} tokens with what the template adds, must be "
                f"at most {room}"
            )
        del kept[first : later[0]]


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose contents are texts. Raises ConfigError for what is neither a text nor a list
    of texts, such as an image."""
    if not messages:
        raise ConfigError("messages: got none, must hold a message or more")
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(f"{where}: has no role, such as user")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_of(part, where) for part in content)
        if content is not None and not isinstance(content, str):
            raise ConfigError(f"{where}.content: must be a text")
        plain.append({**message, "content": content or ""})
    return plain


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise ConfigError(f"{where}.content: got a part of type {kind!r}, must be text")
    return text


class Conversation:
    """The messages so far. The model's cache is kept, so that a turn computes new tokens only."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        system: str | None = None,
    ) -> None:
        self.generator, self.tokenizer, self.template = generator, tokenizer, template
        self.messages: list[Message] = []
        self.system = system
        self.left_out = 0  # messages of the last prompt that did not fit the context

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = []

    def all_messages(self) -> list[Message]:
        """The system's message, if there is one, and those of the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def answer(
        self, text: str, new_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> "Answer":
        """The answer to a message of the user, to be iterated over.

        Raises ConfigError or DataError, and leaves the messages as they were, if no prompt can be
        made of them.
        """
        message = {"role": "user", "content": text}
        messages = [*self.all_messages(), message]
        room = self.generator.length - 1
        ids, kept = fitting(self.template, messages, room)
        self.left_out = len(messages) - len(kept)
        self.messages.append(message)
        count = min(new_tokens, self.generator.length - len(ids))
        # A template ends with all that stands before the answer, but for a space of SentencePiece.
        completion = Completion(self.tokenizer, ids, count, sampling, stop, continued=False)
        return Answer(self, completion)

    def save(self, path: Path) -> None:
        """Write the messages as one line of JSON Lines, as training reads them.

        Raises OSError, and DataError for a conversation without messages.
        """
        if not self.messages:
            raise DataError("nothing was said yet, so there is nothing to save")
        line = json.dumps({"messages": self.all_messages()}, ensure_ascii=False)
        atomic_write(path, f"{line}\n".encode())


class Answer:
    """The pieces of an answer as they are made; what was made becomes a message, even if the
    iteration is left before its end."""

    def __init__(self, conversation: Conversation, completion: Completion) -> None:
        self._conversation, self.completion = conversation, completion
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}

    def __iter__(self) -> Any:
        self._conversation.messages.append(self._message)
        for piece in self.completion.run(self._conversation.generator):
            self._message["content"] += piece
            yield piece
