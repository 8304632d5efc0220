"""Jinja for templates of strangers: time and memory follow the size of the row that is rendered,
never a number or a loop in the template.

    Sandbox    jinja2's sandbox; what a filter, a call, an operator makes is weighed, and what would
               be large is refused before it is made
    metered    put a step into each loop of a parsed template, a charge before each comparison
    limited    a rendering within the limits of a Meter

A template has units to spend, of about a microsecond: a step of a loop costs one, a call or filter
two, and what they read and make costs by its size.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SOURCE = 64 << 10  # characters of a template; those of large models have 20,000
_UNITS = 1_000_000
_UNITS_PER_CHARACTER = 8  # of the row
_MOST_MADE = 4 << 20  # the weight of one value, for the shortest row
_MOST_OF_ROW = 4
_ELEMENT = 64  # weighs as much as so many characters
_MOST_BITS = 4096
_MOST_INDENT = 16
_FREE_TEXT = 64  # characters of a template that are put out unweighed
# The weight of what is read for a unit: by a comparison, by a filter (that sorts, for instance).
_COMPARED, _FILTERED, _MADE = 1024, 64, 16
# Arguments that are numbers multiply the text.
_WIDENING = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice")
)
# Filters that read no more than an element, however much the value holds.
_LIGHT = frozenset(("length", "count", "first", "last", "default", "d"))
# Slow, or larger than what they get, and no model's template has them.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordcount", "wordwrap", "xmlattr")


class Meter:
    """What rendering a row may still cost."""

    def __init__(self, row: Any) -> None:
        size = weight(row)
        self.most = _MOST_MADE + _MOST_OF_ROW * size
        self._left = _UNITS + _UNITS_PER_CHARACTER * size

    def spend(self, units: int) -> None:
        """Raise ValueError where so many are not left."""
        self._left -= units
        if self._left < 0:
            raise ValueError("it takes too long")

    def made(self, value: Any) -> Any:
        """The value, once it is paid for."""
        if isinstance(value, int):
            if value.bit_length() > _MOST_BITS:
                raise ValueError("a number is too large")
            return value
        size = 0 if isinstance(value, range) else weight(value, self.most)
        self.check(size)
        self.spend(1 + size // _MADE)
        return value

    def check(self, size: int) -> None:
        """Raise ValueError for a value of that weight."""
        if size > self.most:
            raise ValueError("a value is too large")

    def listed(self, value: Any) -> Any:
        """What an iterator yields, as a list; another value as it is."""
        if not isinstance(value, Iterator):
            return value
        items, size = [], 0
        for item in value:
            self.spend(1)
            size += _ELEMENT + weight(item, self.most)
            self.check(size)
            items.append(item)
        return items


def weight(value: Any, most: float = float("inf")) -> int:
    """Of a value and of all that it holds, as often as it holds it: characters, and _ELEMENT for
    each element; what is more than `most` is not weighed to its end."""
    if isinstance(value, str | bytes):
        return len(value)
    total, waiting = 0, [value]
    while waiting and total <= most:
        inside = waiting.pop()
        if isinstance(inside, Mapping):
            waiting.append([*inside.keys(), *inside.values()])
        elif isinstance(inside, list | tuple | set | frozenset):
            total += _ELEMENT * len(inside)
            for item in inside:
                if isinstance(item, str | bytes):
                    total += len(item)
                elif isinstance(item, list | tuple | set | frozenset | Mapping | range):
                    waiting.append(item)
        elif isinstance(inside, range):
            total += _ELEMENT * len(inside)
    return total


_running = threading.local()


def _meter() -> Meter:
    meter: Meter = _running.meter
    return meter


@contextmanager
def limited(meter: Meter) -> Iterator[None]:
    """Render within the block by this meter, on this thread."""
    before = getattr(_running, "meter", None)
    _running.meter = meter
    try:
        yield
    finally:
        _running.meter = before


def _step() -> bool:
    """A pass of a loop begins."""
    _meter().spend(1)
    return True


def _compared(value: Any) -> Any:
    """A value that is compared, or in which another one is looked for."""
    meter = _meter()
    meter.spend(1 + weight(value, meter.most) // _COMPARED)
    return value


def _cut(value: Any) -> Any:
    """A slice."""
    _meter().spend(1 + (len(value) // _MADE if hasattr(value, "__len__") else 0))
    return value


def _joined(*values: Any) -> str:
    """What ~ makes."""
    return cast(str, _meter().made("".join(map(str, values))))


def _listed(value: Any) -> Any:
    """A list, a tuple or a mapping that a template spells."""
    return _meter().made(value)


@pass_context
def _put_out(context: Any, value: Any) -> Any:
    """What a template writes; this being a function of the context, constants are not written when
    a template is compiled."""
    _meter().spend(2)
    return _meter().made(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, metered."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))
    step, compared, cut = staticmethod(_step), staticmethod(_compared), staticmethod(_cut)
    joined, listed = staticmethod(_joined), staticmethod(_listed)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False, finalize=_put_out)
        for name in _LEFT_OUT:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters = {name: _metered_filter(name, f) for name, f in self.filters.items()}
        self.tests = {
            n: _metered_test(cast("Callable[..., Any]", f)) for n, f in self.tests.items()
        }

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """One of ours."""
        self.filters[name] = _metered_filter(name, function)

    def call(self, context: Any, called: Any, /, *args: Any, **options: Any) -> Any:
        """Call what a template calls."""
        if isinstance(called, FunctionType) and called.__module__ == __name__:
            # no function of this module can be reached from a template but those
            return called(*args)
        meter = _meter()
        meter.spend(3)
        text = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if isinstance(text, str):
            args = tuple(map(meter.listed, args))
            meter.spend(len(text) // _FILTERED)
            _check_text(called.__name__, text, args, options, meter)
        return meter.made(super().call(context, called, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be larger than both sides."""
        meter = _meter()
        _check_operator(operator, left, right, meter)
        return meter.made(super().call_binop(context, operator, left, right))


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes_more = hasattr(function, "jinja_pass_arg")  # a context or the environment comes first

    @wraps(function)
    def metered(*args: Any, **options: Any) -> Any:
        meter = _meter()
        given = [meter.listed(argument) for argument in args]
        read = 0 if name in _LIGHT else sum(weight(x, meter.most) for x in given)
        meter.spend(2 + read // (1 if name == "title" else _FILTERED))
        if len(given) > takes_more:
            _check_text(name, given[takes_more], given[takes_more + 1 :], options, meter)
        return meter.made(function(*given, **options))

    return metered


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def metered(*args: Any, **options: Any) -> Any:
        for value in args:
            _compared(value)
        return function(*args, **options)

    return metered


def _check_text(name: str, value: Any, args: Any, options: Mapping[str, Any], meter: Meter) -> None:
    """Raise ValueError where a method of a text, or a filter, would make something large."""
    given = [*args, *options.values()]
    if name in _WIDENING:
        numbers = [abs(x) for x in given if isinstance(x, int)]
        widths = [len(x) for x in given if isinstance(x, str)]
        meter.check(max(1, weight(value, meter.most)) * max([1, *numbers, *widths]))
    elif name == "tojson":
        _check_indent([x for x in given if isinstance(x, int | str)])
    elif name == "replace" and len(given) > 1:
        old, new = (len(x) if isinstance(x, str) else 1 for x in given[:2])
        meter.check((weight(value, meter.most) // max(1, old) + 1) * new)
    elif name == "join":
        _check_join(value, given, meter)
    elif name in ("format", "format_map") and isinstance(value, str):
        _check_format(value, given, meter)
    elif name == "sum" and not all(isinstance(x, int | float | str) for x in given):
        raise ValueError("a sum is of numbers")


def _check_indent(given: list[Any]) -> None:
    if any((len(x) if isinstance(x, str) else x) > _MOST_INDENT for x in given):
        raise ValueError(f"an indent of more than {_MOST_INDENT}")


def _check_join(value: Any, given: list[Any], meter: Meter) -> None:
    """Of a list with a text between its elements: a filter of the list, a method of the text."""
    texts = [len(x) for x in (value, *given) if isinstance(x, str)]
    lists = [x for x in (value, *given) if not isinstance(x, str) and hasattr(x, "__len__")]
    count = max(map(len, lists), default=max([0, *texts]))
    sizes = sum(weight(x, meter.most) for x in lists)
    meter.check(sizes + count * max([0, *texts]))


def _check_format(form: str, given: list[Any], meter: Meter) -> None:
    """Of a text with places for values, of % or of {}: each may be any of the values."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)|{[^{}]*(\d{4}|{)", form):
        raise ValueError("a width is too large")
    places = form.count("%") + form.count("{")
    meter.check(len(form) + places * max([0, *(weight(x, meter.most) for x in given)]))


def _check_operator(operator: str, left: Any, right: Any, meter: Meter) -> None:
    """Raise ValueError for an operation whose result a number in the template makes large."""
    numbers = [x for x in (left, right) if isinstance(x, int)]
    if operator == "*" and len(numbers) == 2:
        if sum(x.bit_length() for x in numbers) > _MOST_BITS:
            raise ValueError("a number is too large")
    elif operator == "*" and numbers:
        size = max(weight(x, meter.most) for x in (left, right))
        if size * max(0, *numbers, 0) > meter.most:
            raise ValueError("a text is repeated too often")
    elif operator == "**":
        if max(map(abs, numbers), default=0) > 64 or not isinstance(right, int):
            raise ValueError("a power is too large")
    elif operator == "%" and isinstance(left, str):
        _check_format(left, [right], meter)


def metered(tree: nodes.Template) -> None:
    """Put a step into each loop of a parsed template, and what is charged for around the rest."""
    for loop in list(tree.find_all(nodes.For)):
        if loop.test is not None:
            loop.test = nodes.And(_called("step", loop.test, called_with=[]), loop.test)
        step = _called("step", loop, called_with=[])
        loop.body.insert(0, nodes.ExprStmt(step, lineno=loop.lineno))
    _replace(tree)


def _called(name: str, at: nodes.Node, called_with: list[nodes.Expr]) -> nodes.Expr:
    """A call of one of ours, where a node stands."""
    ours = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(ours, called_with, [], None, None, lineno=at.lineno)


def _replace(node: nodes.Node) -> None:
    """Within a node, all that `_replaced` has another one for."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_replaced(x) if isinstance(x, nodes.Node) else x for x in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _replaced(value))


def _replaced(node: nodes.Node) -> nodes.Node:
    """The node, with a charge for what it makes or reads; a long text of the template as a
    constant, which is weighed when it is put out."""
    _replace(node)
    if isinstance(node, nodes.Concat):
        return _called("joined", node, node.nodes)
    if isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    ):
        return _called("listed", node, [node])
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _called("cut", node, [node])
    if isinstance(node, nodes.Compare):
        node.expr = _called("compared", node, [node.expr])
    elif isinstance(node, nodes.Operand) and not isinstance(node.expr, nodes.Const):
        node.expr = _called("compared", node, [node.expr])
    elif isinstance(node, nodes.TemplateData) and len(node.data) > _FREE_TEXT:
        return nodes.Const(node.data, lineno=node.lineno)
    return node


def spelled(values: Iterator[str], meter: Meter) -> str:
    """The parts of an output, joined. Raises ValueError where they are too many."""
    parts, size = [], 0
    for part in values:
        parts.append(part)
        size += len(part)
        meter.check(size)
    return "".join(parts)
