"""What a parsed TOML file and `--set section.key=value` overrides set, and every problem with it.

Knows no section and no key of ours: config.py hands in the dataclasses.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import tomli

from tinyllama.config.options import (
    Relation,
    allowed,
    convert,
    got,
    nearest,
    options_of,
    problems_of,
)

_UNSET = "none"  # TOML has no null, so `--set section.key=none` stands for "not set"


class Settings:
    """Converted values by dotted key; a later source replaces an earlier one, wrong or not.

    `sections` maps names to dataclasses, `optional` names those that may be absent, `source` is
    the file's name for messages.
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
        """Take what the file says."""
        for section, keys in table.items():
            label = f"{self._source}: {section}"
            if section not in self._options and isinstance(keys, dict):
                near = nearest(section, self._options)
                self._problems[section] = f"{label}: unknown section, the nearest is [{near}]"
            elif section not in self._options:
                near = self._nearest_key(section)
                self._problems[section] = f"{label}: unknown key, the nearest is {near}"
            elif not isinstance(keys, dict):
                self._problems[section] = f"{label}: {got(keys, f'a section, [{section}]')}"
            else:
                self._present.add(section)
                for name, value in keys.items():
                    self._set(f"{section}.{name}", (value,), f"{label}.{name}")

    def add_override(self, text: str) -> None:
        """Take one `section.key=value`; the value is TOML, or else a string."""
        key, equals, raw = (part.strip() for part in text.partition("="))
        label = f"--set {text}"
        section = key.partition(".")[0]
        if raw == _UNSET and key in self._optional:
            self._unset_section(key)
        elif not equals or "." not in key:
            form = "must have the form section.key=value"
            meant = [
                k for options in self._options.values() for k in options if k.endswith(f".{key}")
            ]
            hint = f", here {meant[0]}" if equals and meant else ""
            self._problems[label] = f"{label}: {form}{hint}"
        elif section not in self._options:
            self._problems[label] = f"{label}: unknown key, the nearest is {self._nearest_key(key)}"
        elif raw == _UNSET and self._may_be_unset(key):
            self._unset(key)
        else:
            self._present.add(section)
            self._set(key, _readings(raw), label)
            self._overrides[key] = label

    def section(self, name: str) -> dict[str, Any]:
        """The fields of a section that were set: what its dataclass is made from."""
        options = self._options[name].values()
        return {o.name: self.values[o.key] for o in options if o.key in self.values}

    def has_section(self, name: str) -> bool:
        """Whether the section is there: always, unless it is an optional one that nobody set."""
        return name in self._present

    def labels(self) -> dict[str, str]:
        """What set each value: `--set section.key=value`, or the file and the key."""
        return {key: self._label((key,)) for key in self.values}

    def section_label(self, name: str) -> str:
        """What set something in a section: an override, else the file."""
        found = [label for key, label in self._overrides.items() if key.startswith(f"{name}.")]
        return found[0] if found else self._source

    def known_values(self) -> dict[str, Any]:
        """Every value that stands, set or default; keys with a wrong value are left out."""
        return {
            key: self.values.get(key, option.default)
            for section, options in self._options.items()
            if section in self._present
            for key, option in options.items()
            if key not in self._problems
        }

    def problems(self, relations: Iterable[Relation], values: Mapping[str, Any]) -> list[str]:
        """Every problem, one line each: what was refused, then the relations that do not hold."""
        return [*self._problems.values(), *problems_of(relations, values, self._label)]

    def _set(self, key: str, readings: tuple[Any, ...], label: str) -> None:
        """Keep the first reading of a value that the key's type lets through."""
        self._unset(key)
        option = self._options[key.partition(".")[0]].get(key)
        if option is None:
            self._problems[label] = f"{label}: unknown key, the nearest is {self._nearest_key(key)}"
            return
        for reading in readings:
            try:
                self.values[key] = convert(reading, option.hint)
            except ValueError:
                continue
            return
        self._problems[key] = f"{label}: {got(readings[0], allowed(option.hint))}"

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

    def _nearest_key(self, key: str) -> str:
        """A key of the same name in any section, else the nearest name in the nearest section."""
        section, _, name = key.rpartition(".")
        near = [nearest(section, self._options)] if section else list(self._options)
        everywhere = [key for options in self._options.values() for key in options]
        same = [other for other in everywhere if other.rpartition(".")[2] == name]
        keys = same or [other for other in everywhere if other.partition(".")[0] in near]
        names = {other.rpartition(".")[2]: other for other in keys}
        return names[nearest(name, names)]

    def _label(self, keys: tuple[str, ...]) -> str:
        """Where a broken relation comes from: an override that took part in it, else the file."""
        override = next((key for key in keys if key in self._overrides), None)
        if override == keys[0]:
            return self._overrides[override]
        return f"{self._overrides[override] if override else self._source}: {keys[0]}"


def _readings(raw: str) -> tuple[Any, ...]:
    """What an override's text may mean, likeliest first: `2024` is a number, or else a name."""
    try:
        table = tomli.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return (raw,)
    if table.keys() != {"value"}:  # a line break in it began another key
        return (raw,)
    value = table["value"]
    return (value,) if isinstance(value, str | list | dict) else (value, raw)
