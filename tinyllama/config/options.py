"""How an option is declared once: its check, messages, documentation and --help derive from it.

An option is a dataclass field. Its type hint holds the limits, its metadata the help text; msgspec
converts a value by the hint. The options themselves are in sections.py.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from tinyllama.system.untrusted import printable

_NOUNS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
_LIMITS = {
    "ge": "of {} or more",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
}
PATH = "path"  # in the `extra` of a hint: text that names a file or folder, `~` is its user's home
_SHOWN_CHARACTERS = 100
_COMPARED_CHARACTERS = 100  # of a name that is looked for: no option's is half as long
_HELP_COLUMNS = 80
MOST_BITS = 128  # of an integer that is computed with; sizes of models are counted exactly
_DECIMAL_BITS = 4096  # Python refuses to write far larger integers in decimal


class Option(NamedTuple):
    """One key of one section: `key` is dotted, `name` the field, `hint` the type with its
    limits."""

    key: str
    name: str
    default: Any
    hint: Any
    help: str


class Relation(NamedTuple):
    """A condition on several options. `words` says what the first one must be; in it {0}, {1}, ...
    are the values."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    words: str

    def problem(self, values: Mapping[str, Any]) -> str | None:
        """The message if the condition does not hold; None if it does or if a value is missing."""
        if any(key not in values for key in self.keys):
            return None
        given = [values[key] for key in self.keys]
        if self.holds(*given):
            return None
        return got(given[0], self.words.format(*map(shown, given)))


def problems_of(
    relations: Iterable[Relation],
    values: Mapping[str, Any],
    label: Callable[[tuple[str, ...]], str] = lambda keys: keys[0],
) -> list[str]:
    """One line per relation that does not hold; `label` names the file or override."""
    checked = ((relation.keys, relation.problem(values)) for relation in relations)
    return [f"{label(keys)}: {problem}" for keys, problem in checked if problem]


def option(default: Any, help_text: str, key: str | None = None) -> Any:
    """A dataclass field with its default and its help text; `key` where it is not the field's
    name."""
    return dataclasses.field(default=default, metadata={"help": help_text, "key": key})


@functools.cache
def options_of(section: str, cls: type) -> tuple[Option, ...]:
    """The options that a dataclass declares, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple(
        Option(
            f"{section}.{field.metadata['key'] or field.name}",
            field.name,
            field.default,
            hints[field.name],
            field.metadata["help"],
        )
        for field in dataclasses.fields(cls)
    )


def convert(value: object, hint: Any) -> Any:
    """The value as the hint's type: an integer becomes a float, a list a tuple, and `~` in a path
    the user's home folder.

    Raises ValueError for another type, a value outside the limits, an infinity, a NaN, and text
    that no file could hold (a NUL or half of a surrogate pair).
    """
    if isinstance(value, msgspec.Struct):  # made in Python, where nothing was checked
        value = msgspec.structs.asdict(value)
    try:
        converted = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    if not _is_storable(converted):
        raise ValueError("not a finite number or not valid text")
    return os.path.expanduser(converted) if _is_path(hint, converted) else converted


def is_too_large(value: object) -> bool:
    """Whether arithmetic with a number could fail: a float holds none of more than 1,023 bits, and
    products of some must be such."""
    return isinstance(value, int) and value.bit_length() > MOST_BITS


def _is_path(hint: Any, value: object) -> bool:
    """Whether a value is text whose hint, or a part of it, is marked as PATH."""
    metas = [meta for part in (hint, *get_args(hint)) for meta in getattr(part, "__metadata__", ())]
    return isinstance(value, str) and any((meta.extra or {}).get(PATH) for meta in metas)


def _is_storable(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, tuple):
        return all(map(_is_storable, value))
    if isinstance(value, msgspec.Struct):
        return all(map(_is_storable, msgspec.structs.astuple(value)))
    return True


def allowed(hint: Any) -> str:
    """The values that a hint allows, in words: `an integer of 1 or more`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1])
    if origin in (Union, UnionType):
        return " or ".join(allowed(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return listed(map(to_toml, arguments))
    if origin is tuple:
        return f"a list, each item {allowed(arguments[0])}"
    return _table(hint) if issubclass(hint, msgspec.Struct) else _NOUNS[hint]


def _table(cls: type[msgspec.Struct]) -> str:
    """A table of keys: what its first one allows, and the names of the others."""
    first, *others = msgspec.structs.fields(cls)
    kinds = allowed(get_type_hints(cls, include_extras=True)[first.name])
    return f"a table with {first.name} ({kinds}) and {', '.join(other.name for other in others)}"


def _limited(base: Any, meta: msgspec.Meta) -> str:
    if base is str:
        return meta.description or "a string that is not empty"
    if get_origin(base) is tuple:
        return f"a list of one or more, each {allowed(get_args(base)[0])}"
    limits = ((words, getattr(meta, name)) for name, words in _LIMITS.items())
    phrases = [words.format(limit) for words, limit in limits if limit is not None]
    return f"{allowed(base)} {' and '.join(phrases)}"


def listed(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *front, last = words
    return f"{', '.join(front)} or {last}" if front else last


def got(value: object, must_be: str) -> str:
    """The message for a value that is refused."""
    return f"got {shown(value)}, must be {must_be}"


def shown(value: object) -> str:
    """A value for a message: as in TOML, and shortened if it is long."""
    try:
        text = "nothing" if value is None else to_toml(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return printable(cut, 4 * len(cut))  # escapes are longer than what they stand for


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate most similar to `word`, by its letters or its initials: wd is weight_decay."""
    return max(candidates, key=functools.partial(similarity, word[:_COMPARED_CHARACTERS]))


def similarity(word: str, candidate: str) -> float:
    """How similar two names are, 0 to 1, by the letters of both or the second one's initials."""
    initials = "".join(part[:1] for part in candidate.split("_"))
    return max(difflib.SequenceMatcher(None, word, s).ratio() for s in (candidate, initials))


def to_toml(value: object) -> str:
    """A value as TOML text that reads back as the same value; other types by repr."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int) and value.bit_length() > _DECIMAL_BITS:
        return hex(value)
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        value = {name: item for name, item in fields.items() if item is not None}
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, dict):
        pairs = (f"{to_toml(str(key))} = {to_toml(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value) if isinstance(value, int | float) else str(value)


def text_rows(options: Iterable[Option]) -> Iterator[str]:
    """Each option for a terminal: key and default, then what it is and what is allowed."""
    for key, _, default, hint, help_text in options:
        yield f"  {key} = {'(not set)' if default is None else to_toml(default)}"
        for text in (help_text, f"allowed: {allowed(hint)}"):
            yield textwrap.fill(
                text, _HELP_COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6
            )


def markdown_rows(options: Iterable[Option]) -> Iterator[str]:
    """One table row per option: key, default, what is allowed, what it is for."""
    for key, _, default, hint, help_text in options:
        default_text = "not set" if default is None else f"`{to_toml(default)}`"
        cells = (f"`{key}`", default_text, allowed(hint), help_text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
