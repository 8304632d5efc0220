"""Rows of conversations, in the forms that people have, and their tokens.

kind           by what a row holds
messages       {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
prompt         {"prompt": ..., "completion": ...}, both texts or both messages
alpaca         {"instruction": ..., "input": ..., "output": ...}
sharegpt       {"conversations": [{"from": "human", "value": ...}, ...]}
preference     {"chosen": ..., "rejected": ..., "prompt": ...}, the prompt given or what the two
               begin with alike

parse          a row -> a Conversation (two for a preference)
Encoder        a Conversation -> ids, and whether each is trained
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import msgspec

from tinyllama.errors import DataError
from tinyllama.system.untrusted import printable
from tinyllama.tokenizers.templates import NAMED, ChatTemplate, Encoded, named_template
from tinyllama.tokenizers.tokenizer import Tokenizer

Kind = Literal["text", "messages", "prompt", "alpaca", "sharegpt", "preference"]
TrainOn = Literal["all", "assistant", "last"]

# What a row of each kind has; the first kind that fits is taken.
_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# All that is read of a row of any kind.
COLUMNS = {key for keys in _KEYS.values() for key in keys}
COLUMNS |= {"tools", "system", "input", "history"}
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function", "function_response"), "tool"),
}
_CALL = "function_call"  # a role of ShareGPT


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of transformers; those before `first_trained` are a prompt.

    `is_plain`: of a row of two texts without roles, or of an instruction; a model without a chat
    template can be trained on it.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_trained: int = 0
    plain: Literal["none", "alpaca"] | None = None  # the template, where a model has none
    untrained: frozenset[int] = field(default=frozenset())  # of weight 0

    @cached_property
    def digest_bytes(self) -> bytes:
        """What the conversation says, for a hash of it."""
        return msgspec.json.encode([self.messages, self.tools], order="sorted")


@dataclass(frozen=True)
class Form:
    """How rows of conversations become tokens. `template` is one of NAMED; None for the model's
    own. `train_on` None is the assistant's part, and the completion of a prompt. `pairs`: both
    answers of a preference, one after the other, else only the chosen one."""

    template: str | None = None
    train_on: TrainOn | None = None
    pairs: bool = False


OWN = Form()


def kind_of(keys: "Mapping[str, Any] | set[str]") -> Kind | None:
    """The kind of a row with these keys; None if it is none of them."""
    return next((kind for kind, needed in _KEYS.items() if all(k in keys for k in needed)), None)


def every_kind() -> str:
    """What a row may hold, for a message."""
    kinds = (kind for kind in _KEYS if kind != "text")
    return f"a row of conversations has {', '.join(map(expected, kinds))}"


def expected(kind: Kind) -> str:
    """The keys of a kind, for a message."""
    return " and ".join(f'"{key}"' for key in _KEYS[kind])


def parse(row: Any, kind: Kind) -> list[Conversation]:
    """The conversations of a row: one, or the chosen and the rejected one.

    Raises DataError, whose message has no place yet.
    """
    if not isinstance(row, dict):
        raise DataError(f"must be an object with {expected(kind)}, got {type(row).__name__}")
    if any(key not in row for key in _KEYS[kind]):
        found = kind_of(row)
        keys = ", ".join(printable(repr(key), 40) for key in list(row)[:8]) or "none"
        other = f" of another kind ({expected(found)})" if found else ""
        raise DataError(
            f"no {expected(kind)}; keys found: {keys}: the file's first row has it, and a row"
            f"{other} belongs into a file of its own"
        )
    tools = _tools(row.get("tools"))
    if kind == "preference":
        return [replace(c, tools=tools) for c in _preference(row)]
    readers = {"messages": _messages, "sharegpt": _sharegpt, "prompt": _prompt, "alpaca": _alpaca}
    return [replace(readers[kind](row), tools=tools)]


class Encoder:
    """Conversations to ids and a mask, with one tokenizer and one form."""

    def __init__(self, tokenizer: Tokenizer, form: Form) -> None:
        self._tokenizer, self._form = tokenizer, form
        self._named: dict[str, ChatTemplate] = {}

    def __call__(self, conversation: Conversation) -> Encoded:
        """Ids, and whether each is trained. Raises DataError."""
        template = self._template(conversation)
        messages = _for_template(conversation.messages, template)
        train_on = self._form.train_on or "assistant"
        wanted = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
            and number >= conversation.first_trained
            and number not in conversation.untrained
            and _says_something(message)
        ]
        if train_on == "last":
            wanted = wanted[-1:]
        encoded = template.encode(
            messages, set(wanted), tools=conversation.tools, everything=train_on == "all"
        )
        _check_whole(template, encoded.text, messages)
        return encoded

    def _template(self, conversation: Conversation) -> ChatTemplate:
        own = self._tokenizer.chat_template
        name = self._form.template or ("" if own is not None else conversation.plain)
        if name is None:
            raise DataError(
                "messages need a chat template, and the tokenizer has none: set data.template to "
                f"one of {', '.join(NAMED)}"
            )
        if name not in self._named:
            if name:
                self._named[name] = named_template(name, self._tokenizer)
            else:
                assert own is not None
                self._named[name] = ChatTemplate(own, self._tokenizer, "the model's chat template")
        return self._named[name]


def _says_something(message: dict[str, Any]) -> bool:
    """Whether there is anything to learn of an answer but that it ends."""
    content = message.get("content")
    return bool(message.get("tool_calls") or (isinstance(content, str) and content.strip()))


def _check_whole(template: ChatTemplate, text: str, messages: list[dict[str, Any]]) -> None:
    """Raise DataError where the template leaves out what a user or the system says, or a call."""
    for number, message in enumerate(messages):
        writes_calls = "tool_calls" in template.source
        if not all(writes_calls and name in text for name in _called_names(message)):
            raise DataError(
                f"{template.name} leaves out the tool calls of message {number + 1}: leave out the "
                "row, or take a model whose template writes them"
            )
        content = message.get("content")
        if message["role"] not in ("system", "user") or not isinstance(content, str):
            continue
        if content.strip() not in text:
            raise DataError(
                f"{template.name} leaves out message {number + 1}, of role {message['role']}: join "
                "it with another message, or set data.template"
            )


def _called_names(message: dict[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    calls = message.get("tool_calls")
    functions = [
        call.get("function", call)
        for call in (calls if isinstance(calls, list) else [])
        if isinstance(call, dict)
    ]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _for_template(messages: list[dict[str, Any]], template: ChatTemplate) -> list[dict[str, Any]]:
    """The messages in the words of a template: an instruction's input beside it or below it,
    arguments of calls as objects or as text."""
    made = []
    for message in messages:
        message = dict(message)
        if template.name != "the template alpaca" and "input" in message:
            rest = message.pop("input")
            message["content"] += f"\n\n{rest}" if rest else ""
        if message.get("tool_calls") and not template.takes_arguments_as_text:
            message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        made.append(message)
    return made


def _with_object(call: Any) -> Any:
    """A call whose arguments are an object, as templates expect; OpenAI's are JSON text."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(call["arguments"])}
        except (ValueError, RecursionError):
            return call
    return call


# ---- the forms of rows


def _messages(row: dict[str, Any]) -> Conversation:
    return _conversation(row["messages"], "messages")


def _conversation(value: Any, key: str, first_trained: int = 0) -> Conversation:
    value = _parsed(value)
    if not isinstance(value, list):
        raise DataError(f'"{key}" must be a list of messages, got {type(value).__name__}')
    if not value:
        raise DataError(f'"{key}" is empty')
    messages = [_message(entry, f"{key}[{number}]") for number, entry in enumerate(value)]
    untrained = frozenset(
        number for number, entry in enumerate(value) if entry.get("weight") in (0, False)
    )
    return Conversation(messages, first_trained=first_trained, untrained=untrained)


def _message(entry: Any, place: str) -> dict[str, Any]:
    """A message of roles that templates know. Raises DataError."""
    if not isinstance(entry, dict):
        raise DataError(f'{place}: must be an object {{"role": ..., "content": ...}}')
    message = {key: value for key, value in entry.items() if value is not None}
    if "from" in message and "role" not in message:
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
    role = message.get("role")
    if role == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": [_called(message, place)]}
    known_as = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known_as is None:
        known = "system, user, assistant or tool"
        raise DataError(f"{place}: role: got {printable(repr(role), 60)}, must be {known}")
    message["role"] = known_as
    message.pop("weight", None)
    content = _content(message.get("content"), place)
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{place}: has no content")
    if content is None and "content" in entry:
        message["content"] = None
    elif content is not None:
        message["content"] = content
    return message


def _content(content: Any, place: str) -> str | None:
    """The text of a message, of one or more parts. Raises DataError for what is no text."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise DataError(f"{place}: holds a part of type {printable(repr(other), 40)}, not text")
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise DataError(f"{place}: content must be a text, got {type(content).__name__}")


def _called(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A call of a function from ShareGPT's text. Raises DataError."""
    call = _parsed(message.get("content"))
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DataError(f'{place}: {_CALL} must be a text {{"name": ..., "arguments": ...}}')
    return {"type": "function", "function": {"arguments": {}, **call}}


def _parsed(value: Any) -> Any:
    """A value that tables hold as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _tools(value: Any) -> list[Any] | None:
    value = _parsed(value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise DataError(f'"tools" must be a list, got {type(value).__name__}')
    return value


def _sharegpt(row: dict[str, Any]) -> Conversation:
    conversation = _conversation(row["conversations"], "conversations")
    system = row.get("system")
    if not system:
        return conversation
    if not isinstance(system, str):
        raise DataError(f'"system" must be a text, got {type(system).__name__}')
    messages = [{"role": "system", "content": system}, *conversation.messages]
    untrained = frozenset(number + 1 for number in conversation.untrained)
    return replace(conversation, messages=messages, untrained=untrained)


def _alpaca(row: dict[str, Any]) -> Conversation:
    """An instruction with its input; `system` and `history` as LLaMA-Factory has them."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, list | tuple) or not all(isinstance(t, str) for t in pair):
            raise DataError('"history" must be a list of pairs of texts')
        roles = zip(("user", "assistant"), pair, strict=False)
        messages += [{"role": role, "content": text} for role, text in roles]
    question = {"role": "user", "content": _text(row, "instruction")}
    if row.get("input"):
        question["input"] = _text(row, "input")
    messages += [question, {"role": "assistant", "content": _text(row, "output")}]
    return Conversation(messages, plain="alpaca")


def _text(row: dict[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f'"{key}" must be a text, got {type(text).__name__}')
    return text


def _prompt(row: dict[str, Any]) -> Conversation:
    return _joined(row["prompt"], row["completion"], "completion")


def _joined(prompt: Any, answer: Any, key: str) -> Conversation:
    """A prompt and what follows it, both texts or both messages."""
    prompt, answer = (_parsed_messages(value) for value in (prompt, answer))
    if isinstance(answer, list):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(before, list):
            raise DataError('"prompt" must be a text or a list of messages')
        return _conversation([*before, *answer], f"prompt + {key}", len(before))
    if isinstance(prompt, list) and isinstance(answer, str):
        answered = [*prompt, {"role": "assistant", "content": answer}]
        return _conversation(answered, f"prompt + {key}", len(prompt))
    for name, value in (("prompt", prompt), (key, answer)):
        if not isinstance(value, str):
            raise DataError(f'"{name}" must be a text, got {type(value).__name__}')
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(messages, plain="none", first_trained=1)


def _parsed_messages(value: Any) -> Any:
    """Messages, of which tables hold the JSON text; any other text stays one."""
    parsed = _parsed(value)
    is_list = isinstance(parsed, list) and parsed and all(isinstance(m, dict) for m in parsed)
    return parsed if is_list else value


def _preference(row: dict[str, Any]) -> list[Conversation]:
    """The chosen and the rejected conversation, after one prompt."""
    chosen, rejected = (_parsed_messages(row[key]) for key in ("chosen", "rejected"))
    prompt = row.get("prompt")
    both = (("chosen", chosen), ("rejected", rejected))
    if type(chosen) is not type(rejected):
        raise DataError('"chosen" and "rejected" must both be texts or both lists of messages')
    if isinstance(chosen, list):
        before = _parsed_messages(prompt)
        before = [{"role": "user", "content": before}] if isinstance(before, str) else before or []
        if before and chosen[: len(before)] == before:  # the prompt is repeated in both
            before = []
        alike = [] if before else _alike(chosen, rejected)
        start = len(before) or len(alike)
        return [_conversation([*before, *answer], key, start) for key, answer in both]
    if prompt is None:
        prompt = _implied(str(chosen), str(rejected))
        both = tuple((key, str(text)[len(prompt) :]) for key, text in both)  # type: ignore[assignment]
    return [_joined(prompt, answer, key) for key, answer in both]


def _alike(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The messages that both begin with, but for an answer that ends one of them."""
    most = min(len(chosen), len(rejected)) - 1
    pairs = zip(chosen[:most], rejected[:most], strict=True)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _implied(chosen: str, rejected: str) -> str:
    """The prompt that two texts begin with: to where an assistant speaks (as in Anthropic's
    "\\n\\nAssistant:"), else to the last space that both have."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = "".join(character for character, _ in alike)
    turn = common.rfind("\n\nAssistant:")
    if turn >= 0:
        return common[: turn + len("\n\nAssistant:")]
    return common[: max(common.rfind(" "), common.rfind("\n")) + 1]
