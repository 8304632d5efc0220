"""A TOML file and `--set section.key=value` overrides become one frozen Config.

    TOML text -> table -> Settings (+ overrides) -> relations between keys -> Config

All problems are reported together, one line each, with the file or override, and for words of
other trainers (other_words.py) with what to write here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from tinyllama.config import other_words
from tinyllama.config.config import OPTIONAL_SECTIONS, SECTIONS, Config, section_problems
from tinyllama.config.options import (
    MOST_BITS,
    Relation,
    allowed,
    convert,
    got,
    is_too_large,
    nearest,
    options_of,
    problems_of,
    to_toml,
)
from tinyllama.config.presets import find_config
from tinyllama.config.sections import RELATIONS, checkable
from tinyllama.errors import ConfigError
from tinyllama.system.untrusted import printable, read_small

_UNSET = "none"  # TOML has no null, so `--set section.key=none` stands for "not set"
_MOST_SUGGESTED = 400  # characters
_MOST_EXPLAINED = 50  # unknown names for which the nearest known one is looked for
# tomli needs time and memory that grow with the square of the parts of a key: a.a.a.a.a = 1
_MOST_PARTS = 32
_LONG_KEY = re.compile(
    r"""^[ \t]*+\[{0,2}[ \t]*+(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+)"""
    f"{{{_MOST_PARTS}}}",
    re.MULTILINE,
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, with or without BOM and CRLF, and apply overrides `section.key=value`.

    `path` may be the name of a shipped configuration, such as 124m; a file of that name comes
    first. Raises ConfigError with every problem, one line each.
    """
    path = find_config(path)
    data = read_small(path, ConfigError)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    config = config_from_toml(text, str(path), overrides)
    if huge := [key for key, value in config.values().items() if is_too_large(value)]:
        below = f"must be below 2^{MOST_BITS} to be computed with"
        raise ConfigError("\n".join(f"{config.where(key)}: {below}" for key in huge))
    return config


def config_from_toml(text: str, source_name: str, overrides: Sequence[str] = ()) -> Config:
    """A Config from TOML text; `source_name` stands for the file in messages.

    Raises ConfigError with every problem, one line each.
    """
    settings = Settings(SECTIONS, OPTIONAL_SECTIONS, source_name)
    try:
        settings.add_table(parse_toml(text.removeprefix("\ufeff")))
    except ValueError as error:
        raise ConfigError(f"{source_name}: not valid TOML: {printable(error)}") from error
    for override in overrides:
        settings.add_override(override)
    values = settings.known_values()
    problems = settings.problems(RELATIONS, checkable(values))
    label = settings.section_label("qlora")
    problems += [f"{label}: {problem}" for problem in section_problems(values)]
    if problems:
        raise ConfigError("\n".join(problems))
    made = {
        name: cls(**settings.section(name))
        for name, cls in SECTIONS.items()
        if settings.has_section(name)
    }
    return Config(**made, given=settings.labels())


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML file from anybody. Raises ValueError, whose message has the line."""
    if found := _LONG_KEY.search(text):
        line = text.count("\n", 0, found.end()) + 1
        raise ValueError(f"A key of more than {_MOST_PARTS} parts (at line {line})")
    try:
        return tomli.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def meant_key(name: str) -> str | None:
    """The key that a bare name means, or the sentence that answers it; None for an unknown one."""
    own = [o.key for section, cls in SECTIONS.items() for o in options_of(section, cls)]
    same = [key for key in own if key.rpartition(".")[2] == name]
    return same[0] if same else other_words.WORDS.get(name)


class Settings:
    """Converted values by dotted key. A later value replaces an earlier one, even a wrong one.

    `sections` maps names to dataclasses, `optional` lists those that may be absent, `source` is
    the file's name in messages.
    """

    def __init__(self, sections: Mapping[str, type], optional: Iterable[str], source: str) -> None:
        self.values: dict[str, Any] = {}
        self._source = source
        self._optional = frozenset(optional)
        self._options = {
            section: {option.key: option for option in options_of(section, cls)}
            for section, cls in sections.items()
        }
        self._present = set(self._options) - self._optional
        self._problems: dict[str, str] = {}
        self._overrides: dict[str, str] = {}

    def add_table(self, table: Mapping[str, Any]) -> None:
        """Add the keys of a parsed TOML file."""
        for section, keys in table.items():
            label = f"{self._source}: {printable(section)}"
            if section not in self._options and isinstance(keys, dict):
                self._problems[section] = f"{label}: {self._unknown_section(section)}"
            elif section not in self._options:
                self._problems[section] = f"{label}: {self._unknown(section)}"
            elif not isinstance(keys, dict):
                self._problems[section] = f"{label}: {got(keys, f'a section, [{section}]')}"
            else:
                self._present.add(section)
                for name, value in keys.items():
                    self._set(f"{section}.{name}", (value,), f"{label}.{printable(name)}")

    def add_override(self, text: str) -> None:
        """Add one `section.key=value`; a value that is not TOML is a string."""
        key, equals, raw = (part.strip() for part in text.partition("="))
        label = f"--set {text}"
        section = key.partition(".")[0]
        if raw == _UNSET and key in self._optional:
            self._unset_section(key)
        elif not equals or "." not in key:
            self._problems[label] = f"{label}: {self._without_section(key if equals else None)}"
        elif section not in self._options:
            self._problems[label] = f"{label}: {self._unknown(key)}"
        elif raw == _UNSET and self._may_be_unset(key):
            self._unset(key)
        else:
            self._present.add(section)
            self._set(key, _readings(raw), label)
            self._overrides[key] = label

    def section(self, name: str) -> dict[str, Any]:
        """The fields of a section that were set: arguments of its dataclass."""
        options = self._options[name].values()
        return {o.name: self.values[o.key] for o in options if o.key in self.values}

    def has_section(self, name: str) -> bool:
        """Whether the section is present: not if it is optional and nothing in it was set."""
        return name in self._present

    def labels(self) -> dict[str, str]:
        """Where each value comes from: `--set section.key=value`, or the file and the key."""
        return {key: self._label((key,)) for key in self.values}

    def section_label(self, name: str) -> str:
        """Where a section comes from: an override, else the file."""
        labels = [label for key, label in self._overrides.items() if key.startswith(f"{name}.")]
        return labels[0] if labels else self._source

    def known_values(self) -> dict[str, Any]:
        """Every value, set or default, without the keys whose value is wrong."""
        return {
            key: self.values.get(key, option.default)
            for section, options in self._options.items()
            if section in self._present
            for key, option in options.items()
            if key not in self._problems
        }

    def problems(self, relations: Iterable[Relation], values: Mapping[str, Any]) -> list[str]:
        """Every problem, one line each: refused keys and values, then relations."""
        return [*self._problems.values(), *problems_of(relations, values, self._label)]

    def _set(self, key: str, readings: tuple[Any, ...], label: str) -> None:
        """Keep the first reading of a value that the key allows."""
        self._unset(key)
        option = self._options[key.partition(".")[0]].get(key)
        if option is None:
            self._problems[label] = f"{label}: {self._unknown(key)}"
            return
        if is_too_large(readings[0]) and not key.startswith("model."):
            problem = got(readings[0], f"{allowed(option.hint)} and below 2^{MOST_BITS}")
            self._problems[key] = f"{label}: {problem}"
            return
        for reading in readings:
            try:
                self.values[key] = convert(reading, option.hint)
            except ValueError:
                continue
            return
        problem = got(readings[0], allowed(option.hint))
        self._problems[key] = f"{label}: {problem}{_instead(readings[0], option.hint)}"

    def _without_section(self, name: str | None) -> str:
        """What to say about an override that is no `section.key=value`, whose key is `name`."""
        form = "must have the form section.key=value"
        known = meant_key(name) if name else None
        if known is None:
            return form
        return f"unknown key: {known}" if " " in known else f"{form}, here {known}"

    def _unset(self, key: str) -> None:
        for table in (self.values, self._overrides, self._problems):
            table.pop(key, None)

    def _unset_section(self, section: str) -> None:
        self._present.discard(section)
        for key in self._options[section]:
            self._unset(key)

    def _may_be_unset(self, key: str) -> bool:
        option = self._options[key.partition(".")[0]].get(key)
        return option is not None and option.default is None

    def _unknown_section(self, name: str) -> str:
        """What to say about a section that does not exist."""
        if len(self._problems) > _MOST_EXPLAINED:
            return "unknown section"
        near = other_words.SECTIONS.get(name) or nearest(name, self._options)
        return f"unknown section, the nearest is [{near}]"

    def _unknown(self, key: str) -> str:
        """What to say about a key that does not exist."""
        if len(self._problems) > _MOST_EXPLAINED:
            return "unknown key"
        known = other_words.WORDS.get(key.rpartition(".")[2])
        if known is not None and " " in known:
            return f"unknown key: {known}"
        return f"unknown key, the nearest is {known or self._nearest_key(key)}"

    def _nearest_key(self, key: str) -> str:
        """The key of this name in another section, else the nearest name in the nearest section."""
        section, _, name = key.rpartition(".")
        near = [nearest(section, self._options)] if section else list(self._options)
        everywhere = [key for options in self._options.values() for key in options]
        same = [other for other in everywhere if other.rpartition(".")[2] == name]
        keys = same or [other for other in everywhere if other.partition(".")[0] in near]
        names = {other.rpartition(".")[2]: other for other in keys}
        return names[nearest(name, names)]

    def _label(self, keys: tuple[str, ...]) -> str:
        """Where a relation that does not hold comes from: an override, else the file."""
        override = next((key for key in keys if key in self._overrides), None)
        if override == keys[0]:
            return self._overrides[override]
        return f"{self._overrides[override] if override else self._source}: {keys[0]}"


def _readings(raw: str) -> tuple[Any, ...]:
    """What an override's text may mean, likeliest first: `2024` is a number, or else text."""
    try:
        table = tomli.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return (raw,)
    if table.keys() != {"value"}:  # a line break in it began another key
        return (raw,)
    value = table["value"]
    return (value,) if isinstance(value, str | list | dict) else (value, raw)


def _instead(value: object, hint: Any) -> str:
    """`: write ...`, where a refused text means something that is allowed; else nothing."""
    for meant in _meanings(value):
        try:
            convert(meant, hint)
        except ValueError:
            continue
        text = to_toml(meant)
        return f": write {text}" if len(text) <= _MOST_SUGGESTED else ""
    return ""


def _meanings(value: object) -> Iterator[object]:
    """What another trainer means by a text: a value under another name, or a list."""
    if isinstance(value, str):
        yield other_words.VALUES.get(value.lower(), value.lower())
        yield [word.strip() for word in value.split(",")]
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield [word.strip() for item in value for word in item.split(",")]
