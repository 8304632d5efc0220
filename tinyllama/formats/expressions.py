"""Regular expressions from files that nobody trusts: matched in time linear in the text.

Python's own engine goes back and tries again, which takes exponential time for `([a-z]+)+!`. Here
an expression is parsed by Python and becomes a graph of states, all of which are followed at once
(Thompson 1968, "Regular expression search algorithm"). Whether a text matches as a whole depends
on nothing else, so that what only changes the order of tries (lazy repeats) needs no care.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_MAX_CHARACTERS = 4096
_MAX_STATES = 20_000

# What leads from a state to the next one: a test of the character that is read, or of the ones
# before and after (None at an end of the text) while none is read.
Reads = Callable[[str], bool]
Stands = Callable[[str | None, str | None], bool]


def _word(char: str | None) -> bool:
    return char is not None and (char.isalnum() or char == "_")


_CATEGORIES: dict[Any, Reads] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: _word,
    op.CATEGORY_NOT_WORD: lambda c: not _word(c),
}
_PLACES: dict[Any, Stands] = {
    op.AT_BEGINNING: lambda before, after: before is None,
    op.AT_BEGINNING_STRING: lambda before, after: before is None,
    op.AT_END: lambda before, after: after is None,
    op.AT_END_STRING: lambda before, after: after is None,
    op.AT_BOUNDARY: lambda before, after: _word(before) != _word(after),
    op.AT_NON_BOUNDARY: lambda before, after: _word(before) == _word(after),
}


class Expression:
    """A compiled expression. Raises ValueError for one that is wrong, or needs more than states
    (a reference to a group, a look ahead), or more of them than any list of layers does."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"is longer than {_MAX_CHARACTERS} characters")
        try:
            with warnings.catch_warnings():  # of what a later Python will read in another way
                warnings.simplefilter("ignore")
                parsed = parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if parsed.state.flags & ~int(re.UNICODE):
            raise ValueError("has flags, which are not supported")
        self._reads: list[tuple[Reads, int] | None] = []  # by state
        self._free: list[list[tuple[Stands | None, int]]] = []
        self._end = self._state()
        try:
            self._start = self._add(parsed, self._end)
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error

    def matches(self, text: str) -> bool:
        """Whether the expression matches the whole of a text."""
        states = self._reached([self._start], None, text[:1] or None)
        for place, char in enumerate(text):
            moves = (self._reads[state] for state in states)
            ahead = [move[1] for move in moves if move is not None and move[0](char)]
            after = text[place + 1] if place + 1 < len(text) else None
            states = self._reached(ahead, char, after)
        return self._end in states

    def _reached(self, states: Iterable[int], before: str | None, after: str | None) -> set[int]:
        """States that can be reached without reading a character."""
        found, ahead = set(states), list(states)
        while ahead:
            for stands, target in self._free[ahead.pop()]:
                if target not in found and (stands is None or stands(before, after)):
                    found.add(target)
                    ahead.append(target)
        return found

    def _state(self) -> int:
        if len(self._free) >= _MAX_STATES:
            raise ValueError("repeats too much")
        self._reads.append(None)
        self._free.append([])
        return len(self._free) - 1

    def _add(self, items: Iterable[tuple[Any, Any]], target: int) -> int:
        """States for a sequence of parsed items that leads to `target`; returns the first."""
        for kind, value in reversed(list(items)):
            target = self._item(kind, value, target)
        return target

    def _item(self, kind: Any, value: Any, target: int) -> int:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            state = self._state()
            self._reads[state] = (_reads(kind, value), target)
            return state
        if kind is op.AT and value in _PLACES:
            return self._branch([(_PLACES[value], target)])
        if kind is op.BRANCH:
            return self._branch([(None, self._add(way, target)) for way in value[1]])
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self._add(value[3], target)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, repeated = value
            return self._repeat(least, most, repeated, target)
        raise ValueError(f"{str(kind).lower()} is not supported in a regular expression here")

    def _branch(self, ways: list[tuple[Stands | None, int]]) -> int:
        state = self._state()
        self._free[state] = ways
        return state

    def _repeat(self, least: int, most: int, items: Any, target: int) -> int:
        if most is op.MAXREPEAT:
            loop = self._state()
            self._free[loop] = [(None, target), (None, self._add(items, loop))]
            target = loop
        else:
            after = target
            for _ in range(most - least):
                target = self._branch([(None, after), (None, self._add(items, target))])
        for _ in range(least):
            target = self._add(items, target)
        return target


def _reads(kind: Any, value: Any) -> Reads:
    """The test of a character that one parsed item makes."""
    if kind is op.LITERAL:
        return lambda char: ord(char) == value
    if kind is op.NOT_LITERAL:
        return lambda char: ord(char) != value
    if kind is op.ANY:
        return lambda char: char != "\n"
    negated = value[0][0] is op.NEGATE
    tests = [_member(*member) for member in value[int(negated) :]]
    return lambda char: any(test(char) for test in tests) is not negated


def _member(kind: Any, value: Any) -> Reads:
    """The test of one member of a set, such as a-z."""
    if kind is op.LITERAL:
        return lambda char: ord(char) == value
    if kind is op.RANGE:
        return lambda char: value[0] <= ord(char) <= value[1]
    return _CATEGORIES[value]


@functools.lru_cache(maxsize=64)
def expression(text: str) -> Expression:
    """The compiled expression, kept for the next text. Raises ValueError."""
    return Expression(text)
