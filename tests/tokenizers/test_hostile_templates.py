"""Templates of strangers that loop, double, widen: each ends within a second, in one line."""

import time
from pathlib import Path

import pytest
from processor_time import within

pytest.importorskip("sentencepiece")

from tinyllama.errors import DataError
from tinyllama.system.memory import resident_bytes
from tinyllama.tokenizers.sandbox import Meter, weight
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from tinyllama.tokenizers.templates import ChatTemplate

MANY = "{% for i in range(99999) %}"
HOSTILE = [
    *(Path(__file__).parent / "hostile_templates.txt").read_text().splitlines(),
    "".join(f"{{% for a{n} in range(9) %}}" for n in range(30)) + "x" + "{% endfor %}" * 30,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{a}}" * 13_000,
    MANY + "{{messages[0].content}}" * 2800 + "{% endfor %}",
    "{% set x %}" + MANY + "z" * 65_000 + "{% endfor %}{% endset %}{{ x }}",
    MANY + "z" * 65_000 + "{% endfor %}",
    "x" * 300_000,
]
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(["It was the best of times\n" * 20], 290)


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:40])
def test_a_template_ends_in_time_and_in_one_line(
    tokenizer: SentencePieceTokenizer, source: str
) -> None:
    before, begun = resident_bytes(peak=True), time.process_time()
    try:
        text = ChatTemplate(source, tokenizer).render(MESSAGES)
        assert len(text) < 3_000_000
    except DataError as error:
        line = str(error)
        assert line.startswith("the chat template") and line.isprintable() and len(line) < 300
    assert time.process_time() - begun < within(2)
    assert resident_bytes(peak=True) - before < 200 << 20


@pytest.mark.parametrize("turns", [3, 3000])
def test_what_is_refused_follows_the_size_of_the_row(
    tokenizer: SentencePieceTokenizer, turns: int
) -> None:
    """A template that looks through what follows each message, as some do, reads long rows too."""
    source = (
        "{% for m in messages %}{% set rest = messages[loop.index0 + 1:] %}"
        "{{ m.role + ': ' + m.content | trim ~ '\n' }}{% if rest and rest[0].role == 'user' %}"
        "{{ '<' ~ rest | length ~ '>' }}{% endif %}{% endfor %}"
    )
    row = [{"role": "user", "content": f" turn {n} {'x' * 50} "} for n in range(turns)]
    lines = ChatTemplate(source, tokenizer).render(row).split("\n")
    assert len(lines) == turns + 1
    assert lines[1] == f"<{turns - 1}>user: turn 1 {'x' * 50}"


def test_a_long_message_is_no_hostile_one(tokenizer: SentencePieceTokenizer) -> None:
    text = "word \n" * 1_000_000
    source = "{{ messages[0].content | trim | replace('\\n', '') }}{{ messages | tojson }}"
    made = ChatTemplate(source, tokenizer).render([{"role": "user", "content": text}])
    assert made.startswith(text.strip().replace("\n", "") + '[{"role": "user"')


def test_what_a_value_holds_twice_weighs_twice() -> None:
    pair = ["abc", "abc"]
    assert weight(pair) == 2 * 64 + 6
    assert weight([pair, pair]) == 2 * 64 + 2 * weight(pair)
    assert weight({"a": pair}) == 2 * 64 + 1 + weight(pair)
    for _ in range(100):
        pair = [pair, pair]
    assert 1000 < weight(pair, 1000) < 2000


def test_a_meter_runs_out() -> None:
    meter = Meter("")
    meter.spend(999_999)
    with pytest.raises(ValueError, match="takes too long"):
        meter.spend(2)
    with pytest.raises(ValueError, match="a value is too large"):
        Meter("").made("x" * (5 << 20))
