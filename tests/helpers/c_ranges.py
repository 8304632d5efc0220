"""Ranges of the integers in a C text: no sum, product or conversion leaves its type.

    Ranges(text, ...).problems("KERNEL")   what may overflow, one line each; empty: nothing

An abstract interpreter over clang's syntax tree. It runs a function with a range in place of every
integer, follows calls, widens loops, and takes from conditions what holds behind them (`i < n`).
Floats, vectors and pointers are not followed, but the indices in them are. What ranges alone cannot
know (that k - k0 is small though k is not) is `known`: by an expression as `printed` shows it,
without casts, if need be behind a function's name ("pack_b: k0 + k"), or by a pattern of such (a
regular expression behind "~"). Every `known` is proved by the caller. Checked are int and what is
converted to it; sums of 64 bits are not.

An integer whose address is taken has any value of its type. Statements that are not followed
(switch, goto, asm that writes an integer) are refused with an AssertionError. What memory holds
goes by the names of arrays and fields: what a function writes there through a pointer with another
name is not seen.
"""

import functools
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Node = dict[str, Any]


class Range(NamedTuple):
    """All integers from `low` to `high`."""

    low: int
    high: int

    def __or__(self, other: "Range") -> "Range":  # type: ignore[override]
        return Range(min(self.low, other.low), max(self.high, other.high))

    def __and__(self, other: "Range") -> "Range":
        both = Range(max(self.low, other.low), min(self.high, other.high))
        return both if both.low <= both.high else self  # excluded: in code that never runs

    def holds(self, other: "Range") -> bool:
        return self.low <= other.low and other.high <= self.high


def _bits(signed: bool, bits: int) -> Range:
    return Range(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else Range(0, (1 << bits) - 1)


TYPES = {
    "_Bool": Range(0, 1), "char": _bits(True, 8), "signed char": _bits(True, 8),
    "unsigned char": _bits(False, 8), "short": _bits(True, 16), "unsigned short": _bits(False, 16),
    "int": _bits(True, 32), "unsigned int": _bits(False, 32), "long": _bits(True, 64),
    "unsigned long": _bits(False, 64), "long long": _bits(True, 64),
    "unsigned long long": _bits(False, 64),
}  # fmt: skip
BOTH = Range(0, 1)
_CASTS = ("ImplicitCastExpr", "CStyleCastExpr", "CXXStaticCastExpr", "CXXFunctionalCastExpr")
_THROUGH = ("ParenExpr", "ConstantExpr", "AttributedStmt", "ExprWithCleanups")
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "==", "!=": "!="}
_OPPOSITE = {"<": ">=", ">": "<=", "<=": ">", ">=": "<", "==": "!=", "!=": "=="}


def inner(node: Node) -> list[Node]:
    """The parts of a node but attributes. What is found out about a node is kept in it."""
    found: list[Node] | None = node.get("_parts")
    if found is None:
        found = [n for n in node.get("inner", ()) if n and not n["kind"].endswith("Attr")]
        node["_parts"] = found
    return found


def type_of(node: Node) -> Range | None:
    """The range of an integer's type; None for what is no integer."""
    if "_type" not in node:
        node["_type"] = _type_of(node.get("type", {}))
    kind: Range | None = node["_type"]
    return kind


def _type_of(types: Node) -> Range | None:
    for name in (types.get("desugaredQualType"), types.get("qualType", "")):
        name = re.sub(r"\b(const|volatile|restrict)\b ?", "", name or "").strip()
        if name in TYPES:
            return TYPES[name]
        if name.startswith("enum "):
            return TYPES["int"]
    return None


def printed(node: Node) -> str:
    """An expression in C without casts; every operation within another one in parentheses."""
    if "_text" not in node:
        node["_text"] = _printed(node)
    return str(node["_text"])


def _printed(node: Node) -> str:
    kind, parts = node["kind"], inner(node)
    if kind in _CASTS or kind in _THROUGH:
        return printed(parts[-1])
    if kind == "DeclRefExpr":
        return str(node["referencedDecl"]["name"])
    if kind == "MemberExpr":
        return f"{printed(parts[0])}.{node['name']}"
    if kind == "ArraySubscriptExpr":
        return f"{_operand(parts[0])}[{printed(parts[1])}]"
    if kind in ("BinaryOperator", "CompoundAssignOperator"):
        return f"{_operand(parts[0])} {node['opcode']} {_operand(parts[1])}"
    if kind == "UnaryOperator":
        return f"{node['opcode']}{_operand(parts[0])}"
    if kind == "ConditionalOperator":
        return " ".join([_operand(parts[0]), "?", _operand(parts[1]), ":", _operand(parts[2])])
    if kind == "CallExpr":
        return f"{printed(parts[0])}({', '.join(map(printed, parts[1:]))})"
    return str(node.get("value", kind))


def _operand(node: Node) -> str:
    text = printed(node)
    return f"({text})" if (" " in text and not text.endswith(")")) or " " in text else text


def walk(node: Node) -> Iterator[Node]:
    yield node
    for part in inner(node):
        yield from walk(part)


def reached(node: Node) -> Node:
    """Without parentheses and casts."""
    while node["kind"] in _CASTS or node["kind"] in _THROUGH:
        node = inner(node)[-1]
    return node


Env = dict[str, Range]  # by a variable's id in the tree


class Ranges:
    """The integers of one text."""

    def __init__(
        self,
        text: str,
        sizes: Mapping[str, tuple[int, int]],
        known: Mapping[str, tuple[int, int]] | None = None,
        memory: Mapping[str, tuple[int, int]] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """sizes: of constants that the text declares and does not define. memory: of what arrays
        and the fields of structures hold, by their names; what the text writes there is checked."""
        command = ["clang", "-x", "c", "-std=gnu17", "-w", "-fsyntax-only", *flags]
        command += ["-Xclang", "-ast-dump=json", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        self.tree: Node = json.loads(done.stdout)
        self.functions: dict[str, Node] = {}
        self.constants: dict[str, Range] = {}
        self.sizes = {name: Range(*pair) for name, pair in sizes.items()}
        self.known = {text: Range(*pair) for text, pair in (known or {}).items()}
        self._limits: dict[tuple[str, str], list[Range]] = {}
        self.memory = {name: Range(*pair) for name, pair in (memory or {}).items()}
        self.records: dict[str, list[Node]] = {}
        names = [name for name in dir(self) if name.startswith("_value_")]
        self._methods = {name.removeprefix("_value_"): getattr(self, name) for name in names}
        self._declarations()
        self.found: list[str] = []
        self._function = ""
        self._facts: list[dict[str, Range]] = []
        self._silent = 0
        self._results: dict[tuple[Any, ...], tuple[Range | None, bool]] = {}
        self._returned: list[Range] = []
        self._left: list[list[Env]] = []  # what holds where a loop's body goes on with the next
        self._broken: list[list[Env]] = []  # round, and where it ends the loop
        self._assigned: dict[int, dict[str, str]] = {}
        self._anything = {
            str(variable["referencedDecl"]["name"])
            for node in walk(self.tree)
            if node["kind"] == "UnaryOperator" and node["opcode"] == "&"
            for variable in [reached(inner(node)[0])]
            if variable["kind"] == "DeclRefExpr" and type_of(variable) is not None
        }  # variables that may change through a pointer

    def _declarations(self) -> None:
        fields: dict[str, list[Node]] = {}
        for node in walk(self.tree):
            if node["kind"] == "FunctionDecl" and any(
                n["kind"] == "CompoundStmt" for n in inner(node)
            ):
                self.functions[node["name"]] = node
            elif node["kind"] == "EnumConstantDecl":
                value = next(n["value"] for n in walk(node) if "value" in n)
                self.constants[node["id"]] = Range(int(value), int(value))
            elif node["kind"] == "RecordDecl":
                fields[node["id"]] = [n for n in inner(node) if n["kind"] == "FieldDecl"]
            elif node["kind"] == "TypedefDecl":
                owned = [n for n in walk(node) if n.get("decl", {}).get("id") in fields]
                if owned:
                    self.records[node["name"]] = fields[owned[-1]["decl"]["id"]]

    # ---- from outside

    def problems(self, function: str, **arguments: tuple[int, int]) -> list[str]:
        """What may overflow when a function is called with these arguments (others: any)."""
        node = self.functions[function]
        parameters = [n for n in inner(node) if n["kind"] == "ParmVarDecl"]
        given = {name: Range(*pair) for name, pair in arguments.items()}
        assert given.keys() <= {p.get("name") for p in parameters}
        self._call(node, [given.get(p.get("name", ""), type_of(p)) for p in parameters])
        return list(dict.fromkeys(self.found))

    # ---- functions

    def _call(self, node: Node, arguments: Sequence[Range | None]) -> Range | None:
        key = (node["id"], *arguments)
        known = self._results.get(key)
        if known and (known[1] or self._silent):
            return known[0]
        outer = self._function, self._facts, self._returned
        self._function, self._facts, self._returned = node["name"], [], []
        parameters = [n for n in inner(node) if n["kind"] == "ParmVarDecl"]
        env = {p["id"]: a for p, a in zip(parameters, arguments, strict=True) if a is not None}
        self._run(next(n for n in inner(node) if n["kind"] == "CompoundStmt"), env)
        result: Range | None = None
        for value in self._returned:
            result = value if result is None else result | value
        self._function, self._facts, self._returned = outer
        self._results[key] = result, not self._silent
        return result

    # ---- statements

    def _run(self, node: Node, env: Env) -> None:
        run = getattr(self, f"_run_{node['kind']}", None)
        if run is not None:
            run(node, env)
        elif node["kind"] in _THROUGH and node["kind"] != "ParenExpr":
            self._run(inner(node)[-1], env)
        else:
            self.value(node, env)

    def _run_CompoundStmt(self, node: Node, env: Env) -> None:
        self._facts.append({})
        for part in inner(node):
            self._run(part, env)
            if part["kind"] == "IfStmt" and len(inner(part)) == 2 and _leaves(inner(part)[1]):
                self._facts[-1] |= self._assumed(inner(part)[0], False, env)
        self._facts.pop()

    def _run_NullStmt(self, node: Node, env: Env) -> None:
        pass

    def _run_DeclStmt(self, node: Node, env: Env) -> None:
        for declared in inner(node):
            if declared["kind"] != "VarDecl":
                continue
            self._drop(declared["name"])
            parts = inner(declared)
            value = self.value(parts[-1], env) if "init" in declared else None
            kind = type_of(declared)
            if kind is not None:
                env[declared["id"]] = kind if value is None else value

    def _run_GCCAsmStmt(self, node: Node, env: Env) -> None:
        for operand in inner(node):
            self.value(operand, env)
            is_variable = operand["kind"] == "DeclRefExpr"  # what is only read is a conversion
            assert not is_variable or type_of(operand) is None, f"asm writes {printed(operand)}"

    def _run_ReturnStmt(self, node: Node, env: Env) -> None:
        for part in inner(node):
            value = self.value(part, env)
            if value is not None:
                self._returned.append(value)

    def _run_BreakStmt(self, node: Node, env: Env) -> None:
        self._broken[-1].append(dict(env))

    def _run_ContinueStmt(self, node: Node, env: Env) -> None:
        self._left[-1].append(dict(env))

    def _run_IfStmt(self, node: Node, env: Env) -> None:
        condition, *branches = inner(node)
        holds = self.value(condition, env) or BOTH
        ends = []
        for branch, true in zip([*branches, None][:2], (True, False), strict=True):
            if holds == ((0, 0) if true else (1, 1)):
                continue
            after = dict(env)
            if branch is not None:
                self._facts.append(self._assumed(condition, true, after))
                self._run(branch, after)
                self._facts.pop()
            if branch is None or not _leaves(branch):
                ends.append(after)
        _become(env, ends)

    def _run_ForStmt(self, node: Node, env: Env) -> None:
        begin, _, condition, step, body = (n or None for n in node["inner"])
        if begin is not None:
            self._run(begin, env)
        self._loop(condition, step, body, env)

    def _run_WhileStmt(self, node: Node, env: Env) -> None:
        condition, body = inner(node)
        self._loop(condition, None, body, env)

    def _run_DoStmt(self, node: Node, env: Env) -> None:
        body, condition = inner(node)
        self._run(body, env)
        self._loop(condition, None, body, env)

    def _loop(self, condition: Node | None, step: Node | None, body: Node, env: Env) -> None:
        changed: dict[str, str] = {}
        for part in (condition, step, body):
            changed |= self._changed(part) if part else {}
        for name in changed.values():
            self._drop(name)
        moving = [key for key in changed if key in env]
        entry = dict(env)
        if condition is not None and self.value(condition, dict(env)) == (0, 0):
            return

        exits: list[Env] = []

        def once(start: Env) -> Env:
            after = dict(start)
            self._left.append([])
            self._broken.append([])
            learned: dict[str, Range] = {}
            if condition is not None:
                self.value(condition, after)
                learned = self._assumed(condition, True, after)
            self._facts.append(learned)
            self._run(body, after)
            _become(after, [after, *self._left[-1]])
            if step is not None:
                self.value(step, after)
            self._facts.pop()
            self._left.pop()
            exits[:] = self._broken.pop()
            return after

        counted = self._counted(condition, step, body, moving, env)
        if counted is not None:
            env[moving[0]] = counted
        elif moving:
            env.update(self._invariant(once, entry, moving))
        end = once(env)
        for key in moving:
            assert env[key].holds(end[key]), f"{self._function}: {changed[key]} is not bounded"
        _become(env, [env, *exits])

    def _counted(
        self, condition: Node | None, step: Node | None, body: Node, moving: list[str], env: Env
    ) -> Range | None:
        """The range at the head of a loop whose one variable only its third part changes, upwards;
        None for other loops."""
        if (
            condition is None
            or step is None
            or len(moving) != 1
            or moving[0] in self._changed(body)
        ):
            return None
        target, *added = map(reached, inner(step))
        if target["kind"] != "DeclRefExpr" or step.get("opcode") not in ("++", "+="):
            return None
        self._silent += 1
        by = (self.value(added[0], env) if added else None) or Range(1, 1)
        start, kind = env[moving[0]], type_of(target)
        assert kind is not None
        wide = env | {moving[0]: Range(start.low, kind.high)}
        learned = self._learned(condition, True, wide)
        self._silent -= 1
        limit = learned.get(target["referencedDecl"]["name"])
        if limit is None or by.low < 0:
            return None
        return Range(start.low, max(start.high, limit.high + by.high))

    def _invariant(self, once: Any, entry: Env, moving: list[str]) -> Env:
        """Ranges of the variables that a loop changes, at its head: widened, then narrowed."""
        self._silent += 1
        start = dict(entry)
        for _ in range(3):
            end = once(start)
            wider = {key: _widened(start[key], end[key]) for key in moving}
            if all(start[key] == wider[key] for key in moving):
                break
            start |= wider
        for _ in range(2):
            end = once(start)
            smaller = start | {key: entry[key] | end[key] for key in moving}
            if all(smaller[key].holds(once(smaller)[key]) for key in moving):
                start = smaller
        self._silent -= 1
        return {key: start[key] for key in moving}

    def _changed(self, node: Node) -> dict[str, str]:
        """Ids and names of the variables, and names of the memory, that a part of the tree may
        assign to."""
        if id(node) not in self._assigned:
            found = {}
            for part in walk(node):
                changes = part["kind"] == "CompoundAssignOperator" or (
                    part["kind"] in ("BinaryOperator", "UnaryOperator")
                    and part["opcode"] in ("=", "++", "--")
                )
                if changes:
                    target = reached(inner(part)[0])
                    if target["kind"] == "DeclRefExpr":
                        found[target["referencedDecl"]["id"]] = target["referencedDecl"]["name"]
                    else:
                        found[f"memory {_base(target)}"] = _base(target)
                if part["kind"] == "CallExpr":
                    found |= {f"memory {name}": name for name in _reachable(part)}
            self._assigned[id(node)] = found
        return self._assigned[id(node)]

    # ---- facts

    def _drop(self, name: str) -> None:
        """Forget what a condition said about a variable that changes."""
        for facts in self._facts:
            for text in [text for text in facts if name in _words(text)]:
                del facts[text]

    def _learned(self, condition: Node, true: bool, env: Env) -> dict[str, Range]:
        """What holds of expressions if a condition is true, or false."""
        self._silent += 1
        facts: dict[str, Range] = {}
        self._learn(reached(condition), true, env, facts)
        self._silent -= 1
        return facts

    def _assumed(self, condition: Node, true: bool, env: Env) -> dict[str, Range]:
        """The same, of variables also in their ranges."""
        facts = self._learned(condition, true, env)
        for part in walk(condition):
            if part["kind"] == "DeclRefExpr" and part["referencedDecl"]["name"] in facts:
                key = part["referencedDecl"]["id"]
                if key in env:
                    env[key] = env[key] & facts[part["referencedDecl"]["name"]]
        return facts

    def _learn(self, node: Node, true: bool, env: Env, facts: dict[str, Range]) -> None:
        if node["kind"] == "UnaryOperator" and node["opcode"] == "!":
            self._learn(reached(inner(node)[0]), not true, env, facts)
        operator = node.get("opcode", "") if node["kind"] == "BinaryOperator" else ""
        if operator not in ("&&", "||", "&", *_MIRRORED):
            value = self.value(node, env)
            if true and value is not None and value.low == 0:
                self._restrict(node, Range(1, 1 << 64), env, facts)
            return
        if operator in ("&&", "||", "&"):
            if true == (operator != "||"):
                for part in inner(node):
                    self._learn(reached(part), true, env, facts)
            return
        operator = operator if true else _OPPOSITE[operator]
        left, right = inner(node)
        first, second = self.value(left, env), self.value(right, env)
        if first is not None and second is not None:
            self._bound(left, operator, second, env, facts)
            self._bound(right, _MIRRORED[operator], first, env, facts)
        if operator in (">", ">="):
            left, right = right, left
        if operator in ("<", "<=", ">", ">="):
            difference = f"{_operand(right)} - {_operand(left)}"
            facts[difference] = Range(int(operator in ("<", ">")), 1 << 64)

    def _bound(
        self, node: Node, operator: str, other: Range, env: Env, facts: dict[str, Range]
    ) -> None:
        limits = {
            "<": (-(1 << 64), other.high - 1), "<=": (-(1 << 64), other.high),
            ">": (other.low + 1, 1 << 64), ">=": (other.low, 1 << 64),
            "==": (other.low, other.high),
        }  # fmt: skip
        if operator in limits:
            self._restrict(reached(node), Range(*limits[operator]), env, facts)

    def _restrict(self, node: Node, limit: Range, env: Env, facts: dict[str, Range]) -> None:
        text = printed(node)
        facts[text] = facts.get(text, limit) & limit
        if node["kind"] != "BinaryOperator" or node["opcode"] not in ("+", "-", "*"):
            return
        left, right = map(reached, inner(node))
        a, b = self.value(left, env), self.value(right, env)
        if a is None or b is None:
            return
        if node["opcode"] == "+":
            self._restrict(left, Range(limit.low - b.high, limit.high - b.low), env, facts)
            self._restrict(right, Range(limit.low - a.high, limit.high - a.low), env, facts)
        elif node["opcode"] == "-":
            self._restrict(left, Range(limit.low + b.low, limit.high + b.high), env, facts)
        elif b.low == b.high > 0:
            low = -(-limit.low // b.low)
            self._restrict(left, Range(low, limit.high // b.low), env, facts)

    def _narrowed(self, text: str, value: Range) -> Range:
        key = self._function, text
        if key not in self._limits:
            self._limits[key] = [
                limit
                for name, limit in self.known.items()
                if name in (text, f"{self._function}: {text}")
                or (name[0] == "~" and re.fullmatch(name[1:], text))
            ]
        for limit in self._limits[key]:
            value = value & limit
        for facts in self._facts:
            if text in facts and not self._anything & _words(text):
                value = value & facts[text]
        return value

    # ---- expressions

    def value(self, node: Node, env: Env) -> Range | None:
        """The range of an expression; None if it is no integer."""
        evaluate = self._methods.get(node["kind"])
        if node["kind"] in _THROUGH:
            return self.value(inner(node)[-1], env)
        found: Range | None
        if evaluate is not None:
            found = evaluate(node, env)
        else:
            assert not node["kind"].endswith("Stmt"), node["kind"]
            for part in inner(node):
                self.value(part, env)
            found = type_of(node)
        return found

    def _value_IntegerLiteral(self, node: Node, env: Env) -> Range:
        return Range(int(node["value"]), int(node["value"]))

    def _value_DeclRefExpr(self, node: Node, env: Env) -> Range | None:
        kind, declared = type_of(node), node["referencedDecl"]
        if declared["id"] in self.constants:
            return self.constants[declared["id"]]
        if kind is None or declared.get("name") in self._anything:
            return kind
        value = env.get(declared["id"], self.sizes.get(declared.get("name", ""), kind))
        return self._narrowed(declared["name"], value & kind)

    def _value_MemberExpr(self, node: Node, env: Env) -> Range | None:
        for part in inner(node):
            self.value(part, env)
        return self._stored(node["name"], node)

    def _value_ArraySubscriptExpr(self, node: Node, env: Env) -> Range | None:
        for part in inner(node):
            self.value(part, env)
        return self._stored(_base(node), node)

    def _stored(self, name: str, node: Node) -> Range | None:
        kind = type_of(node)
        return kind and self._narrowed(printed(node), self.memory.get(name, kind))

    def _value_UnaryExprOrTypeTraitExpr(self, node: Node, env: Env) -> Range:
        return Range(1, 64)  # sizeof an element or a vector

    def _value_StmtExpr(self, node: Node, env: Env) -> None:
        raise AssertionError("statements within an expression")

    def _value_InitListExpr(self, node: Node, env: Env) -> None:
        name = re.sub(r"const ", "", node["type"]["qualType"])
        fields = self.records.get(name, [])
        for place, part in enumerate(inner(node)):
            value = self.value(part, env)
            if place < len(fields) and value is not None:
                self._write(fields[place]["name"], value, printed(part))

    def _value_CallExpr(self, node: Node, env: Env) -> Range | None:
        callee, *arguments = inner(node)
        values = [self.value(part, env) for part in arguments]
        name = printed(callee)
        result = type_of(node)
        if name in self.functions:
            result = self._narrow(node, self._call(self.functions[name], values))
        for written in _reachable(node):
            self._drop(written)
        return result

    def _narrow(self, node: Node, value: Range | None) -> Range | None:
        return value and self._narrowed(printed(node), value)

    def _cast(self, node: Node, env: Env) -> Range | None:
        part, kind = inner(node)[-1], type_of(node)
        value = self.value(part, env)
        if kind is None or value is None:
            return kind
        if node.get("castKind") == "IntegralToBoolean":
            return BOTH
        source = type_of(part)
        if node["kind"] == "CStyleCastExpr" and source and source.low == 0 > kind.low:
            if source.high == 2 * kind.high + 1:  # the same bits, with a sign
                return value if kind.holds(value) else kind
        return self._fitted(value, kind, printed(node), "as ")

    _value_ImplicitCastExpr = _value_CStyleCastExpr = _cast

    def _fitted(self, value: Range, kind: Range, text: str, word: str = "") -> Range:
        """A value in its type. What leaves it wraps around if unsigned, and else is a problem."""
        if kind.holds(value):
            return value
        if kind.low < 0 and kind.high < 1 << 62 and not self._silent:
            name = next(n for n, t in TYPES.items() if t == kind)
            self.found.append(f"{self._function}: {text} {word}{name}: {value.low} to {value.high}")
        kept = value & kind
        return kept if kind.low < 0 and kind.holds(kept) else kind

    def _value_UnaryOperator(self, node: Node, env: Env) -> Range | None:
        (part,), operator, kind = inner(node), node["opcode"], type_of(node)
        value = self.value(part, env)
        if operator == "*":
            return self._stored(_base(node), node)
        if kind is None or value is None:
            return kind
        if operator in ("++", "--"):
            step = 1 if operator == "++" else -1
            moved = self._fitted(Range(value.low + step, value.high + step), kind, printed(node))
            self._assign(part, moved, env)
            return value | moved
        if operator == "-":
            return self._fitted(Range(-value.high, -value.low), kind, printed(node))
        if operator == "!":
            return (
                BOTH
                if value.low <= 0 <= value.high and value != (0, 0)
                else Range(int(value == (0, 0)), int(value == (0, 0)))
            )
        return Range(~value.high, ~value.low) & kind if operator == "~" else value

    def _value_ConditionalOperator(self, node: Node, env: Env) -> Range | None:
        condition, *branches = inner(node)
        holds, values = self.value(condition, env) or BOTH, []
        for branch, true in zip(branches, (True, False), strict=True):
            if holds != ((0, 0) if true else (1, 1)):
                self._facts.append(self._learned(condition, true, env))
                values.append(self.value(branch, env))
                self._facts.pop()
        if any(value is None for value in values):
            return type_of(node)
        result = values[0] | values[-1]  # type: ignore[operator]
        return self._narrowed(printed(node), result)

    def _value_CompoundAssignOperator(self, node: Node, env: Env) -> Range | None:
        left, right = inner(node)
        a, b, kind = self.value(left, env), self.value(right, env), type_of(node)
        if kind is None or a is None or b is None:
            return kind
        text, operator = printed(node), node["opcode"].removesuffix("=")
        value = self._narrowed(text, _combined(operator, a, b) or kind)
        value = self._fitted(value, kind, text)
        self._assign(left, value, env)
        return value

    def _value_BinaryOperator(self, node: Node, env: Env) -> Range | None:
        (left, right), operator, kind = inner(node), node["opcode"], type_of(node)
        if operator in ("&&", "||"):
            return self._both(left, right, operator, env)
        a = None if operator == "=" else self.value(left, env)
        b = self.value(right, env)
        if operator == "=":
            if b is not None:
                self._assign(left, b, env)
            self.value(left, env)
            return b
        if operator == ",":
            return b
        if kind is None or a is None or b is None:
            return kind
        text = printed(node)
        value = self._narrowed(text, _combined(operator, a, b) or kind)
        return self._fitted(value, kind, text)

    def _both(self, left: Node, right: Node, operator: str, env: Env) -> Range:
        first = self.value(left, env) or BOTH
        decided = first == (0, 0) if operator == "&&" else first.low > 0
        if decided:
            return Range(*[int(operator == "||")] * 2)
        self._facts.append(self._learned(left, operator == "&&", env))
        second = self.value(right, env) or BOTH
        self._facts.pop()
        if operator == "&&":
            if second == (0, 0):
                return Range(0, 0)
            return Range(1, 1) if first.low > 0 and second.low > 0 else BOTH
        if second.low > 0:
            return Range(1, 1)
        return Range(0, 0) if first == second == (0, 0) else BOTH

    def _assign(self, target: Node, value: Range, env: Env) -> None:
        target = reached(target)
        if target["kind"] == "DeclRefExpr":
            declared = target["referencedDecl"]
            self._drop(declared["name"])
            kind = type_of(target)
            if kind is not None:
                env[declared["id"]] = value
        else:
            self._drop(_base(target))
            self._write(_base(target), value, printed(target))

    def _write(self, name: str, value: Range, text: str) -> None:
        allowed = self.memory.get(name)
        if allowed is not None and not allowed.holds(value) and not self._silent:
            self.found.append(
                f"{self._function}: {text} written to {name}: {value.low} to {value.high}"
            )


@functools.cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


def _leaves(node: Node) -> bool:
    """Whether what follows a statement never runs after it."""
    last = inner(node)[-1] if node["kind"] == "CompoundStmt" and inner(node) else node
    return last["kind"] in ("ReturnStmt", "BreakStmt", "ContinueStmt")


def _base(node: Node) -> str:
    """The name of the array or pointer that is read through."""
    for part in walk(node):
        if part["kind"] == "DeclRefExpr":
            return str(part["referencedDecl"]["name"])
        if part["kind"] == "MemberExpr":
            return str(part["name"])
    return ""


def _reachable(call: Node) -> list[str]:
    """Names of what a function may write to through the pointers that a call gives it."""
    pointers = [part for part in inner(call)[1:] if part["type"]["qualType"].endswith("*")]
    names = [_base(part) for part in pointers if "const" not in part["type"]["qualType"]]
    return [name for name in names if name]


def _become(env: Env, ends: Sequence[Env]) -> None:
    """The join of what may hold at a place that several ways lead to."""
    if not ends:
        return
    first, *others = [dict(end) for end in ends]
    for key in first:
        if all(key in other for other in others):
            for other in others:
                first[key] = first[key] | other[key]
    env.clear()
    env.update(first)


def _widened(before: Range, after: Range) -> Range:
    low = before.low if after.low >= before.low else -(1 << 63)
    high = before.high if after.high <= before.high else (1 << 63) - 1
    return Range(low, high)


def _quotient(a: int, b: int) -> int:
    return -(-a // b) if a < 0 else a // b


def _combined(operator: str, a: Range, b: Range) -> Range | None:
    """The range of an operation of two ranges, None if it is not known."""
    if operator == "+":
        return Range(a.low + b.low, a.high + b.high)
    if operator == "-":
        return Range(a.low - b.high, a.high - b.low)
    if operator == "*":
        corners = [x * y for x in a for y in b]
        return Range(min(corners), max(corners))
    if operator in "/%" and b.low >= 0 and b.high > 0:
        return _divided(operator, a, Range(max(b.low, 1), b.high))
    if operator in _MIRRORED:
        return _compared(operator, a, b)
    return _shifted(operator, a, b) if a.low >= 0 and b.low >= 0 else None


def _divided(operator: str, a: Range, b: Range) -> Range:
    if operator == "/":
        corners = [_quotient(x, y) for x in a for y in b]
        return Range(min(corners), max(corners))
    if 0 <= a.low and a.high < b.low:
        return a
    low = 0 if a.low >= 0 else max(1 - b.high, a.low)
    return Range(low, max(0, min(b.high - 1, a.high)))


def _compared(operator: str, a: Range, b: Range) -> Range:
    if operator in (">", ">="):
        a, b, operator = b, a, _MIRRORED[operator]
    always = {
        "<": a.high < b.low, "<=": a.high <= b.low,
        "==": a.low == a.high == b.low == b.high, "!=": a.high < b.low or b.high < a.low,
    }[operator]  # fmt: skip
    never = {
        "<": a.low >= b.high, "<=": a.low > b.high,
        "==": a.high < b.low or b.high < a.low, "!=": a.low == a.high == b.low == b.high,
    }[operator]  # fmt: skip
    return Range(1, 1) if always else Range(0, 0) if never else BOTH


def _shifted(operator: str, a: Range, b: Range) -> Range | None:
    if operator == "<<" and b.high < 64:
        return Range(a.low << b.low, a.high << b.high)
    if operator == ">>" and b.high < 64:
        return Range(a.low >> b.high, a.high >> b.low)
    if operator == "&":
        return Range(0, min(a.high, b.high))
    if operator in "|^":
        return Range(0, (1 << max(a.high, b.high).bit_length()) - 1)
    return None
