"""Chat templates: messages to the text that a model was trained on, and who wrote which part of it.

    ChatTemplate     a Jinja template, the model's own or one of NAMED, in a sandbox
    render           messages -> text
    mark             messages -> text, the characters that the wanted turns generated
    encode           messages -> ids, and which of them are trained

The dialect is that of transformers (`{% generation %}` included). Three things are not in a
template's output and are found by marks, characters that no text holds:

    special tokens in a message    a mark inside each keeps it from being read as a token
    whose turn a text is           a mark before each pass of a loop over messages
    what a turn generates          marks of {% generation %}; or, without those: from where the
                                   prompt for that turn ends, which is rendered, to the last
                                   character of the turn that is no space

The text without marks is compared with that of the template itself, so no mark changes it. Where
one would, turns are found by comparing the texts of the messages up to each.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyllama.errors import DataError
from tinyllama.system.untrusted import printable
from tinyllama.tokenizers.files import read_settings
from tinyllama.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import nodes

Message = Mapping[str, Any]

# Of the characters that Unicode promises never to assign, those that a text does not hold.
_NO_CHARACTERS = [chr(number) for number in range(0xFDD0, 0xFDF0)]

_ALPACA = (
    "{{ begin }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% elif message['role'] == 'user' %}"
    "{% if loop.first %}{% if message.get('input') %}"
    "{{ 'Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n' }}"
    "{% else %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n' }}{% endif %}{% endif %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% if message.get('input') %}{{ '### Input:\n' + message['input'] + '\n\n' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% else %}{{ raise_exception('the template alpaca has no role ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_CHATML = (
    "{{ begin }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must be user, assistant, user, assistant, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the template llama2 has no role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ begin }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_NONE = (
    "{{ begin }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
NAMED: Mapping[str, str] = {
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "alpaca": _ALPACA,
    "none": _NONE,
}


class Marked(NamedTuple):
    """A rendered text; `trained` holds (begin, end) of what the wanted turns generated."""

    text: str
    trained: list[tuple[int, int]]
    inert: list[int]  # places inside special tokens that a message holds as text


class Encoded(NamedTuple):
    """Ids of a conversation, whether each is trained, and the text that they are of."""

    ids: list[int]
    trained: list[bool]
    text: str


@dataclass(frozen=True)
class _Layout:
    """A text without its marks, and where they were."""

    text: str
    turns: Mapping[int, tuple[int, int]]  # number of a message -> its longest part
    generated: list[tuple[int, int]]
    inert: list[int]


class _Turn(dict[str, Any]):
    """A message that knows its number."""

    number = -1


class ChatTemplate:
    """A Jinja template and the special tokens that it writes.

    `name` stands for it in errors. Raises DataError if it is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template") -> None:
        self.source, self.name, self._tokenizer = source, name, tokenizer
        roles = read_settings(tokenizer.sources, name).roles
        self._tokens = {f"{role}_token": text for role, text in roles.items()}
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        self._tokens.setdefault("bos_token", "" if bos is None else tokenizer.pieces[bos])
        self._tokens.setdefault("eos_token", tokenizer.pieces[eos])
        self._plain = _compile(source, name, marked=False)
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) if special else r"(?!)")
        self._stops = tuple(tokenizer.pieces[number] for number in tokenizer.eos_ids)

    @cached_property
    def _with_marks(self) -> Any:
        return _compile(self.source, self.name, marked=True)

    @cached_property
    def _turn_prompt(self) -> str:
        """What is written behind a question for its answer to begin; "" where nothing is, or that
        cannot be seen."""
        question = [{"role": "user", "content": "q"}]
        try:
            without, prompt = (self.render(question, prompt=prompt) for prompt in (False, True))
        except DataError:
            return ""
        return prompt[len(without) :] if prompt.startswith(without) else ""

    @cached_property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template looks if the arguments of a call are a text already."""
        return "arguments is string" in self.source or "arguments is not mapping" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """The text of a conversation; with `prompt`, up to where the next answer begins.

        Raises DataError with the template's reason where it refuses the messages.
        """
        return self._run(self._plain, list(messages), tools, prompt)

    def encode_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the next answer begins. Special tokens that stand in
        a message are text. Raises DataError."""
        marks = _Marks(messages, tools)
        layout = marks.split(self._rendered_with(marks, messages, tools, prompt=True))
        if layout.text != self.render(messages, tools=tools, prompt=True):
            raise DataError(f"{self.name}: it changes texts that hold special tokens")
        text = _with_marks_at(layout.text, layout.inert, marks.inert)
        return self._tokenizer.encode_with_spans(text, marks.inert)[0]

    def encode(
        self,
        messages: Sequence[Message],
        wanted: Collection[int],
        *,
        tools: Sequence[Any] | None = None,
        everything: bool = False,
    ) -> Encoded:
        """Ids, and whether each is trained: it has a character that a wanted message generated.

        `wanted` are numbers of messages; with `everything`, all is trained. Special tokens that
        stand in a message are text. Raises DataError.
        """
        marked, marks = self._mark(messages, set() if everything else wanted, tools)
        text = _with_marks_at(marked.text, marked.inert, marks.inert)
        ids, spans = self._tokenizer.encode_with_spans(text, marks.inert)
        if everything:
            return Encoded(ids, [True] * len(ids), marked.text)
        return Encoded(ids, _overlapping(spans, marked.trained), marked.text)

    def mark(
        self,
        messages: Sequence[Message],
        wanted: Collection[int],
        *,
        tools: Sequence[Any] | None = None,
    ) -> Marked:
        """The text of a conversation and what the messages with these numbers generated in it.
        Raises DataError."""
        return self._mark(messages, wanted, tools)[0]

    def _mark(
        self, messages: Sequence[Message], wanted: Collection[int], tools: Sequence[Any] | None
    ) -> tuple[Marked, "_Marks"]:
        marks = _Marks(messages, tools)
        text = self.render(messages, tools=tools)
        layout = marks.split(self._rendered_with(marks, messages, tools))
        if layout.text != text:
            if self._special.search(text_of(messages)):
                raise DataError(f"{self.name}: it changes texts that hold special tokens")
            layout = _Layout(text, {}, [], [])
        if layout.generated:
            spans = _chosen(layout, wanted)
        else:
            found = (self._span(layout, marks, messages, n, tools) for n in sorted(wanted))
            spans = [span for span in found if span[0] < span[1]]
        return Marked(text, spans, layout.inert), marks

    def _rendered_with(
        self,
        marks: "_Marks",
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        prompt: bool = False,
    ) -> str:
        turns = []
        for number, message in enumerate(messages):
            turn = _Turn(marks.escape(message, self._special))
            turn.number = number
            turns.append(turn)
        tools = marks.escape(tools, self._special)
        return self._run(self._with_marks, turns, tools, prompt, marks=marks)

    def _run(
        self,
        template: Any,
        messages: list[Any],
        tools: Sequence[Any] | None,
        prompt: bool,
        **values: Any,
    ) -> str:
        from jinja2 import TemplateError

        from tinyllama.tokenizers.sandbox import Meter, limited, spelled

        values |= {"messages": messages, "tools": tools, "documents": None}
        values["add_generation_prompt"] = prompt
        meter = Meter([messages, list(tools or ())])
        try:
            with limited(meter):
                return spelled(template.generate(**self._tokens, **values), meter)
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
        ) as error:
            why = printable(" ".join(str(error).split()), 200)
            raise DataError(f"{self.name} refuses the row: {why}") from None
        except (RecursionError, ArithmeticError, LookupError, MemoryError) as error:
            raise DataError(f"{self.name} fails on the row: {type(error).__name__}") from None

    # ---- what a turn generated, where the template does not say it

    def _span(
        self,
        layout: _Layout,
        marks: "_Marks",
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> tuple[int, int]:
        """Begin and end of what message `number` generated."""
        if number not in layout.turns:
            return self._span_by_prefix(layout.text, messages, number, tools)
        begin, end = layout.turns[number]
        start, is_whole = self._start(layout, marks, messages, number, tools)
        content = messages[number].get("content")
        core = content.strip() if isinstance(content, str) else ""
        # Not what stands before the answer: a short answer may also be a part of "assistant".
        first = max(begin, start - max(len(core) - 1, 0))
        at = layout.text.find(core, first, end) if core else -1
        if at < 0:
            return start, self._end(layout.text, start, end, start)
        start = start if is_whole else min(start, at)
        return start, self._end(layout.text, start, end, max(at + len(core), start))

    def _start(
        self,
        layout: _Layout,
        marks: "_Marks",
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Any] | None,
    ) -> tuple[int, bool]:
        """Where the prompt for a message ends in the text, and whether all of it is there: else it
        may also have its first characters in common with the answer."""
        text, (begin, end) = layout.text, layout.turns[number]
        if number == 0 and self._turn_prompt and self._turn_prompt in text[begin:end]:
            at = text.index(self._turn_prompt, begin)
            # Nothing comes before, and a template may write a message of its own instead.
            return at + len(self._turn_prompt), True
        try:
            rendered = self._rendered_with(marks, messages[:number], tools, prompt=True)
        except DataError:  # no conversation begins with an answer, says the template
            return begin, True
        prompt = marks.split(rendered)
        before = there = 0  # what both texts have in common begins, at the latest
        if number - 1 in layout.turns and number - 1 in prompt.turns:
            before, there = layout.turns[number - 1][0], prompt.turns[number - 1][0]
        same = _common(prompt.text, there, text, before)
        if before + same >= begin:
            return min(before + same, end), there + same == len(prompt.text)
        last = max((stop for _, stop in prompt.turns.values()), default=len(prompt.text))
        same = _common(prompt.text, last, text, begin)
        return min(begin + same, end), last + same == len(prompt.text)

    def _end(self, text: str, start: int, end: int, content_end: int) -> int:
        """Where a turn ends: behind its last character that is no space, or behind the token that
        ends it, where the template writes that with what follows."""
        stripped = start + len(text[start:end].rstrip())
        if not text[content_end:end].strip():
            rest = text[end:]
            stop = next((s for s in self._stops if s and rest.lstrip().startswith(s)), None)
            if stop is not None:
                return end + len(rest) - len(rest.lstrip()) + len(stop)
        return max(stripped, min(content_end, end))

    def _span_by_prefix(
        self, text: str, messages: Sequence[Message], number: int, tools: Sequence[Any] | None
    ) -> tuple[int, int]:
        """The same by the texts of the messages before and up to this one."""
        upto = self.render(messages[: number + 1], tools=tools).rstrip()
        before = self.render(messages[:number], tools=tools, prompt=True) if number else ""
        start = _common(before, 0, text, 0)
        if not text.startswith(upto) or start > len(upto):
            raise DataError(
                f"{self.name}: it cannot be seen which part of its text message {number + 1} is: "
                "mark it with {% generation %} and {% endgeneration %}, or set "
                f"data.template to one of {', '.join(NAMED)}, or data.train_on to all"
            )
        return start, len(upto)


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """One of NAMED for a tokenizer."""
    return ChatTemplate(_named_source(name, tokenizer), tokenizer, f"the template {name}")


def portable_template(name: str, tokenizer: Tokenizer) -> str:
    """One of NAMED as other programs read it, which do not know {% generation %}."""
    return re.sub(r"{% (end)?generation %}", "", _named_source(name, tokenizer))


def _named_source(name: str, tokenizer: Tokenizer) -> str:
    """A begin is written where this tokenizer has texts begin with one."""
    return NAMED[name].replace("{{ begin }}", "{{ bos_token }}" if tokenizer.begin else "")


def text_of(value: Any) -> str:
    """All texts within a value, joined."""
    return "\0".join(_texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield str(key)
            yield from _texts(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _texts(inside)


# ---- marks


class _Marks:
    """Characters that the messages do not hold, and what they mean in a text:

    open NAME close    a message's turn begins (t3.0: of message 3, in loop 0), a loop ends (e0), a
                       {% generation %} block begins (g) or ends (h)
    inert              the special token around it is text
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        held = set(text_of([list(messages), list(tools or ())]))
        free = [character for character in _NO_CHARACTERS if character not in held]
        if len(free) < 3:
            raise DataError("the row holds all of U+FDD0 to U+FDEF, which are no characters")
        self.open, self.close, self.inert = free[:3]
        self._mark = re.compile(f"{self.open}([a-z])([0-9]*)\\.?([0-9]*){self.close}|{self.inert}")

    def __call__(self, kind: str, number: object = "", loop: object = "") -> str:
        return f"{self.open}{kind}{number}.{loop}{self.close}"

    def escape(self, value: Any, special: "re.Pattern[str]") -> Any:
        """The value with a mark inside each special token of its texts."""
        if isinstance(value, str):
            return special.sub(lambda found: f"{found[0][:1]}{self.inert}{found[0][1:]}", value)
        if isinstance(value, Mapping):
            return {k: self.escape(inside, special) for k, inside in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(inside, special) for inside in value]
        return value

    def split(self, text: str) -> _Layout:
        """The text and its marks."""
        reader = _MarkReader()
        parts, at = [], 0
        for found in self._mark.finditer(text):
            part = text[at : found.start()]
            parts.append(part)
            reader.size += len(part)
            at = found.end()
            reader.read(found[1], found[2], found[3])
        parts.append(text[at:])
        reader.size += len(parts[-1])
        return reader.layout("".join(parts))


class _MarkReader:
    """Follows the marks of a text; `size` counts the characters before the next one."""

    def __init__(self) -> None:
        self.size = 0
        self._open: dict[str, tuple[int, int]] = {}  # loop -> message, where its turn begins
        self._turns: dict[int, tuple[int, int]] = {}
        self._generated: list[tuple[int, int]] = []
        self._generating = 0
        self._inert: list[int] = []

    def read(self, kind: str | None, number: str, loop: str) -> None:
        if kind is None:
            self._inert.append(self.size)
        elif kind == "t":
            self._end(loop)
            self._open[loop] = int(number), self.size
        elif kind == "e":
            self._end(loop)
        elif kind == "g":
            self._generating = self.size
        elif self.size > self._generating:
            self._generated.append((self._generating, self.size))

    def _end(self, loop: str) -> None:
        if loop not in self._open:
            return
        number, begin = self._open.pop(loop)
        known = self._turns.get(number, (0, 0))
        if self.size - begin > known[1] - known[0]:
            self._turns[number] = begin, self.size

    def layout(self, text: str) -> _Layout:
        return _Layout(text, self._turns, self._generated, self._inert)


def _with_marks_at(text: str, places: Sequence[int], mark: str) -> str:
    if not places:
        return text
    cuts = [0, *places, len(text)]
    return mark.join(text[begin:end] for begin, end in pairwise(cuts))


def _chosen(layout: _Layout, wanted: Collection[int]) -> list[tuple[int, int]]:
    """What {% generation %} blocks wrote in the turns of the wanted messages; where turns are not
    known, in any."""
    spans = []
    for begin, end in layout.generated:
        turns = {n for n, (first, last) in layout.turns.items() if first <= begin and end <= last}
        if wanted and (not turns or not turns.isdisjoint(wanted)):
            spans.append((begin, end))
    return spans


def _overlapping(spans: Sequence[tuple[int, int]], wanted: list[tuple[int, int]]) -> list[bool]:
    """Whether a token has a character in one of the wanted spans.

    A token reaches from the end of the one before it at least: the library leaves spaces out of a
    token's place. One without a width is a byte of the character that follows.
    """
    trained, before, at = [], 0, 0
    for start, stop in spans:
        begin = min(start, before)
        end = max(stop, begin + 1)
        while at < len(wanted) and wanted[at][1] <= begin:
            at += 1
        trained.append(at < len(wanted) and wanted[at][0] < end and begin < wanted[at][1])
        before = stop
    return trained


def _common(one: str, at: int, other: str, there: int) -> int:
    """How many characters are the same from these places on."""
    most = min(len(one) - at, len(other) - there)
    if one[at : at + most] == other[there : there + most]:
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[there : there + middle], at):
            low = middle
        else:
            high = middle - 1
    return low


# ---- Jinja


@cache
def _compile(source: str, name: str, *, marked: bool) -> Any:
    """The template, with calls of `marks` in it if `marked`. Raises DataError."""
    import jinja2

    from tinyllama.tokenizers import sandbox

    if len(source) > sandbox.MOST_SOURCE:
        raise DataError(
            f"{name}: {len(source)} characters, a template may have {sandbox.MOST_SOURCE}"
        )
    environment = _environment()
    try:
        tree = environment.parse(source)
        _prepare(tree, marked)
        sandbox.metered(tree)
        tree.set_environment(environment)
        for node in tree.find_all(jinja2.nodes.Node):
            node.lineno = node.lineno or 1
        return environment.from_string(tree)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        why = getattr(error, "message", None) or getattr(error, "msg", None) or type(error).__name__
        raise DataError(f"{name}{line}: not a Jinja template: {printable(why, 200)}") from None


@cache
def _environment() -> Any:
    """transformers' dialect in our sandbox."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    from tinyllama.tokenizers.sandbox import Sandbox

    class Generation(Extension):
        """{% generation %}: what stands in it is the model's own."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> "list[nodes.Node]":
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (_note(kind, line) for kind in "gh")
            return [begin, *body, end]

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.add_filter("tojson", tojson)
    environment.tests["turn"] = lambda value: isinstance(value, _Turn)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _note(kind: str, line: int) -> "nodes.Node":
    """A place for a mark of that kind, which `_prepare` fills or removes."""
    from jinja2 import nodes

    return nodes.ExprStmt(nodes.Const(kind), lineno=line)


def _output(arguments: "list[nodes.Expr]") -> "nodes.Node":
    from jinja2 import nodes

    called: nodes.Expr = nodes.Call(nodes.Name("marks", "load"), arguments, [], None, None)
    return nodes.Output([called])


def _prepare(tree: "nodes.Node", marked: bool) -> None:
    """Put marks into a parsed template, or nothing where they would be."""
    from jinja2 import nodes

    loops = count()

    def visit(node: nodes.Node) -> None:
        for _, value in node.iter_fields():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, nodes.Node):
                    visit(child)
            if isinstance(value, list):
                value[:] = [made for child in value for made in replaced(child)]

    def replaced(child: Any) -> list[Any]:
        if isinstance(child, nodes.ExprStmt) and _noted(child):
            return [_output([nodes.Const(_noted(child))])] if marked else []
        if marked and isinstance(child, nodes.For) and isinstance(child.target, nodes.Name):
            return _marked_loop(child, child.target.name, next(loops))
        return [child]

    visit(tree)


def _marked_loop(loop: "nodes.For", name: str, number: int) -> "list[nodes.Node]":
    """A loop with a mark before each of its turns, if they are messages, and one behind it."""
    from jinja2 import nodes

    turn = nodes.Name(name, "load")
    mark: list[nodes.Expr] = [
        nodes.Const("t"),
        nodes.Getattr(turn, "number", "load"),
        nodes.Const(number),
    ]
    is_turn = nodes.Test(turn, "turn", [], [], None, None)
    loop.body.insert(0, nodes.If(is_turn, [_output(mark)], [], []))
    return [loop, _output([nodes.Const("e"), nodes.Const(""), nodes.Const(number)])]


def _noted(node: "nodes.ExprStmt") -> str:
    """The kind of mark that belongs here, or "". No statement of a template becomes such a node."""
    from jinja2 import nodes

    value = node.node.value if isinstance(node.node, nodes.Const) else None
    return value if value in ("g", "h") else ""
