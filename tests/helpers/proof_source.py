"""Integer code of the C and Python sources as terms of z3, so that a proof is about what runs.

    CText        a C text completed by macros: `term` gives the value of an expression in it, after
                 clang's own preprocessor has expanded every macro
    python_term  what a Python function of integers returns, by its syntax tree
    quoted       an expression that must stand in a source, word for word
    with_fault   a C text with a fault, which a proof must find
    proved       shows that a claim holds for all integers, or raises with a counterexample

Integers of z3 have no bounds. Division in C rounds towards 0, in z3 downwards: the two agree where
the dividend is at least 0 and the divisor more, and `CText.divisions` collects these conditions, so
that they are proved too. `CText.parts` collects sums and products on the way, for proofs about the
size of integers.
"""

import ast
import inspect
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import z3

OPS = Path(__file__).resolve().parents[2] / "tinyllama/ops/cpu"
_TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|&&|\|\||[<>=!]=|[-+*/%<>?:(),!&])")
_SUFFIX = re.compile(r"\b(\d+)[uUlL]+\b")
_CASTS = re.compile(r"\((?:long|int)\)")


def proved(claim: z3.BoolRef, *given: z3.BoolRef, seconds: int = 60) -> None:
    """Raise AssertionError unless `claim` follows from `given`, which must be possible."""
    solver = z3.Solver()
    solver.set("timeout", seconds * 1000)
    solver.add(*given)
    assert solver.check() != z3.unsat, f"proves nothing: the conditions exclude each other: {claim}"
    solver.add(z3.Not(claim))
    found = solver.check()
    if found == z3.sat:
        raise AssertionError(f"not true: {z3.simplify(claim)}\ncounterexample: {solver.model()}")
    assert found == z3.unsat, f"not decided in {seconds} s: {claim}"


def possible(*given: z3.BoolRef) -> bool:
    """Whether these conditions can hold together: a proof from impossible ones proves nothing."""
    solver = z3.Solver()
    solver.add(*given)
    return solver.check() == z3.sat


def values_of(term: Any, *given: z3.BoolRef) -> Iterator[int]:
    """All values that a term can have, which must be few."""
    solver = z3.Solver()
    solver.add(*given)
    while (found := solver.check()) == z3.sat:
        value = solver.model().eval(term, model_completion=True).as_long()
        yield value
        solver.add(term != value)
    assert found == z3.unsat, f"not decided: {term}"


def quoted(text: str, expression: str) -> str:
    """The expression, which must stand in the text; spaces and line ends do not matter."""
    assert " ".join(expression.split()) in " ".join(text.split()), (
        f"not in the source: {expression}"
    )
    return expression


class CText:
    """C files of ops/cpu in their order, completed by macros."""

    def __init__(self, files: Iterable[str], defines: Mapping[str, object]) -> None:
        lines = [f"#define {name} {value}" for name, value in defines.items()]
        self.text = "\n".join([*lines, *(self.source(file) for file in files)])
        self.divisions: list[z3.BoolRef] = []
        self.parts: list[Any] = []
        self._expanded: dict[tuple[str, ...], str] = {}

    @staticmethod
    def source(file: str) -> str:
        return (OPS / file).read_text(encoding="utf-8")

    def expanded(self, expression: str, without: Iterable[str] = ()) -> str:
        """The expression after the preprocessor; macros in `without` stay as they are named."""
        key = (expression, *sorted(without))
        if key not in self._expanded:
            self._expanded[key] = self._expand(expression, without)
        return self._expanded[key]

    def _expand(self, expression: str, without: Iterable[str]) -> str:
        undefined = [f"#undef {name}" for name in without]
        text = "\n".join([self.text, *undefined, "PROOF_BEGIN", expression, "PROOF_END"])
        command = ["clang", "-E", "-P", "-x", "c", "-"]
        out = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        return out.partition("PROOF_BEGIN")[2].partition("PROOF_END")[0].strip()

    def term(self, expression: str, **values: Any) -> Any:
        """The expression as a term; `values` are those of its variables and replace macros."""
        text = self.expanded(expression, without=values)
        return _Parser(text, values, self.divisions, self.parts).whole()

    def function(self, file: str, name: str) -> Callable[..., Any]:
        """A function of the file that declares integers and returns an expression."""
        match = re.search(rf"INLINE \w+ {name}\(([^)]*)\) {{(.*?)\n?}}", self.source(file), re.S)
        assert match, f"{file}: no function {name}"
        parameters = [part.split()[-1] for part in match[1].split(",")]
        *statements, returned, rest = match[2].split(";")
        assert not rest.strip()

        def call(*arguments: Any) -> Any:
            values = dict(zip(parameters, arguments, strict=True))
            for statement in statements:
                declared = re.sub(r"^\s*(?:long|int)\s+", "", statement)
                for part in declared.split(","):
                    variable, _, value = part.partition("=")
                    values[variable.strip()] = self.term(value, **values)
            return self.term(re.sub(r"^\s*return\s+", "", returned), **values)

        return call


class _Parser:
    """Recursive descent over a C expression of integers."""

    LEVELS = (("||",), ("&&",), ("==", "!="), ("<", ">", "<=", ">="), ("+", "-"), ("*", "/", "%"))

    def __init__(
        self, text: str, values: Mapping[str, Any], divisions: list[z3.BoolRef], parts: list[Any]
    ) -> None:
        text = _CASTS.sub("", _SUFFIX.sub(r"\1", text))
        self.tokens = _TOKEN.findall(text)
        assert "".join(self.tokens) == "".join(text.split()), f"cannot be read: {text}"
        self.at, self.values, self.divisions, self.parts = 0, values, divisions, parts

    def whole(self) -> Any:
        value = self.conditional()
        assert self.at == len(self.tokens), f"left over: {self.tokens[self.at :]}"
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        assert token and expected in (None, token), f"{expected} expected, found {token!r}"
        self.at += 1
        return token

    def conditional(self) -> Any:
        condition = self.level(0)
        if self.peek() != "?":
            return condition
        self.take("?")
        first = self.conditional()
        self.take(":")
        second = self.conditional()
        return (
            z3.If(_true(condition), first, second)
            if _symbolic(condition)
            else (first if condition else second)
        )

    def level(self, number: int) -> Any:
        if number == len(self.LEVELS):
            return self.factor()
        value = self.level(number + 1)
        while self.peek() in self.LEVELS[number]:
            operator = self.take()
            value = self.combined(operator, value, self.level(number + 1))
            if operator in "+-*":
                self.parts.append(value)
        return value

    def combined(self, operator: str, a: Any, b: Any) -> Any:
        if operator in "/%":
            self.divisions.append(z3.And(a >= 0, b > 0) if _symbolic(a, b) else z3.BoolVal(b > 0))
            if _symbolic(a, b):
                return a / b if operator == "/" else a % b
            return a // b if operator == "/" else a % b
        if operator in ("&&", "||"):
            if not _symbolic(a, b):
                return (a and b) if operator == "&&" else (a or b)
            return (z3.And if operator == "&&" else z3.Or)(_true(a), _true(b))
        return {
            "+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "<": lambda: a < b,
            ">": lambda: a > b, "<=": lambda: a <= b, ">=": lambda: a >= b, "==": lambda: a == b,
            "!=": lambda: a != b,
        }[operator]()  # fmt: skip

    def factor(self) -> Any:
        token = self.take()
        if token == "-":
            return -self.factor()
        if token == "!":
            value = self.factor()
            return z3.Not(_true(value)) if _symbolic(value) else not value
        if token == "(":
            value = self.conditional()
            self.take(")")
            return value
        if token.isdigit():
            return int(token)
        if self.peek() == "(":
            return self.call(self.values[token])
        return self.values[token]

    def call(self, function: Callable[..., Any]) -> Any:
        self.take("(")
        arguments = [self.conditional()]
        while self.peek() == ",":
            self.take(",")
            arguments.append(self.conditional())
        self.take(")")
        return function(*arguments)


def _symbolic(*values: Any) -> bool:
    return any(isinstance(value, z3.ExprRef) for value in values)


def _true(value: Any) -> Any:
    if isinstance(value, z3.ArithRef):
        return value != 0
    return value if isinstance(value, z3.BoolRef) else z3.BoolVal(bool(value))


def least(a: Any, b: Any) -> Any:
    return z3.If(a < b, a, b) if _symbolic(a, b) else min(a, b)


def most(a: Any, b: Any) -> Any:
    return z3.If(a > b, a, b) if _symbolic(a, b) else max(a, b)


def python_term(
    function: Callable[..., Any], *arguments: Any, names: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The last values of a function's local variables, and what it returns as "return".

    Of statements: assignments, `if`, one `return` at the end. `names` are globals.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    values: dict[str, Any] = {"min": least, "max": most, **(names or {})}
    parameters = [argument.arg for argument in tree.args.args]
    values |= dict(zip(parameters, arguments, strict=True))
    _run(tree.body, values)
    return values


def python_expression(text: str, values: Mapping[str, Any]) -> Any:
    """A Python expression of integers as a term."""
    return _value(ast.parse(text, mode="eval").body, {"min": least, "max": most, **values})


def _run(statements: Iterable[ast.stmt], values: dict[str, Any]) -> None:
    for statement in statements:
        if isinstance(statement, ast.Assign):
            (target,) = statement.targets
            assert isinstance(target, ast.Name)
            values[target.id] = _value(statement.value, values)
        elif isinstance(statement, ast.Return) and statement.value:
            values["return"] = _value(statement.value, values)
        elif isinstance(statement, ast.If):
            condition = _value(statement.test, values)
            inside, beside = dict(values), dict(values)
            _run(statement.body, inside)
            _run(statement.orelse, beside)
            for name in inside:
                values[name] = _either(condition, inside[name], beside.get(name, inside[name]))
        else:
            assert isinstance(statement, ast.Expr), ast.dump(statement)  # a docstring


def _either(condition: Any, first: Any, second: Any) -> Any:
    if first is second:
        return first
    if _symbolic(condition):
        return z3.If(_true(condition), first, second)
    return first if condition else second


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, values)
    if isinstance(node, ast.Call):
        return _value(node.func, values)(*(_value(part, values) for part in node.args))
    if isinstance(node, ast.IfExp):
        parts = (_value(part, values) for part in (node.test, node.body, node.orelse))
        return _either(*parts)
    if isinstance(node, ast.BoolOp):
        join = z3.And if isinstance(node.op, ast.And) else z3.Or
        return join(*(_true(_value(part, values)) for part in node.values))
    if isinstance(node, ast.Compare):
        left, right = _value(node.left, values), _value(node.comparators[0], values)
        return _COMPARED[type(node.ops[0])](left, right)
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, values), node.attr)
    assert isinstance(node, ast.BinOp), ast.dump(node)
    return _COMPUTED[type(node.op)](_value(node.left, values), _value(node.right, values))


def _floor_divided(a: Any, b: Any) -> Any:
    return a / b if _symbolic(a, b) else a // b


_COMPARED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: lambda a, b: a > b, ast.Lt: lambda a, b: a < b, ast.GtE: lambda a, b: a >= b,
    ast.LtE: lambda a, b: a <= b, ast.Eq: lambda a, b: a == b,
}  # fmt: skip
_COMPUTED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: _floor_divided, ast.LShift: lambda a, b: a << b, ast.Div: lambda a, b: a / b,
}  # fmt: skip


def with_fault(monkeypatch: pytest.MonkeyPatch, file: str, right: str, wrong: str) -> None:
    """From here on, CText reads a C file in which `wrong` stands for `right`, which is there."""
    read = CText.source
    assert right in read(file)

    def changed(name: str) -> str:
        return read(name).replace(right, wrong) if name == file else read(name)

    monkeypatch.setattr(CText, "source", staticmethod(changed))
