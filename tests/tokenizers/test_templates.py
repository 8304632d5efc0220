"""Chat templates: who wrote which part of a text, and what a template may not do."""

import pytest
from data_helpers import small_tokenizer
from tokenizers_helpers import byte_level_files, chatml_files

from tinyllama.errors import DataError
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.templates import NAMED, ChatTemplate, named_template, portable_template
from tinyllama.tokenizers.tokenizer import Tokenizer

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module", params=[byte_level_files, chatml_files])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    return from_files(request.param(), "each")


def marked(source: str, messages: list[dict[str, object]], tokenizer: Tokenizer) -> str:
    """The text with what the assistant generated between [ and ]."""
    template = ChatTemplate(source, tokenizer)
    wanted = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    text, spans, _ = template.mark(messages, wanted)
    for begin, end in reversed(spans):
        text = f"{text[:begin]}[{text[begin:end]}]{text[end:]}"
    return text


LOOP = "{% for m in messages %}"
TWO = [ASK, SAY, ASK, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # The prompt behind the loop, as ChatML has it.
        (
            LOOP + "<{{ m.role }}>{{ m.content }}|\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>q|\n<assistant>[a|]\n<user>q|\n<assistant>[b|]\n",
        ),
        # The prompt inside the user's turn (Zephyr).
        (
            LOOP + "<{{ m.role }}>{{ m.content }}|\n"
            "{% if loop.last and add_generation_prompt %}<assistant>{% endif %}{% endfor %}",
            "<user>q|\n<assistant>[a|]\n<user>q|\n<assistant>[b|]\n",
        ),
        # None at all (Llama 2).
        (
            LOOP + "{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} {{ m.content }} E"
            "{% endif %}{% endfor %}",
            "[I] q [/I][ a E][I] q [/I][ b E]",
        ),
        # One that past turns do not begin with (DeepSeek).
        (
            LOOP + "<{{ m.role }}>{{ m.content }}|{% endfor %}"
            "{% if add_generation_prompt %}<assistant><think>{% endif %}",
            "<user>q|<assistant>[a|]<user>q|<assistant>[b|]",
        ),
        # Past turns lose what the last one has (Qwen 3).
        (
            LOOP + "<{{ m.role }}>{{ '[think]' if loop.last else '' }}{{ m.content }}|"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>q|<assistant>[a|]<user>q|<assistant>[[think]b|]",
        ),
        # The first message outside of the loop (Llama 3.1 with tools), and a look ahead.
        (
            "{{ '<user>' + messages[0].content + '|' }}{% for m in messages[1:] %}"
            "<{{ m.role }}>{{ m.content }}{{ ';' if loop.nextitem is defined else '.' }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>q|<assistant>[a;]<user>q;<assistant>[b.]",
        ),
        # Indexes instead of messages: found by comparing texts.
        (
            "{% for i in range(messages | length) %}<{{ messages[i].role }}>"
            "{{ messages[i].content }}|\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>q|\n<assistant>[a|]\n<user>q|\n<assistant>[b|]\n",
        ),
        # The template says it.
        (
            LOOP + "{% generation %}{{ m.content if m.role == 'assistant' }}{% endgeneration %}"
            "{{ m.content if m.role == 'user' }}|{% endfor %}",
            "q|[a]|q|[b]|",
        ),
    ],
)
def test_an_answer_begins_where_its_prompt_ends(
    tokenizer: Tokenizer, source: str, expected: str
) -> None:
    assert marked(source, TWO, tokenizer) == expected


# As SmolLM2's: a message of its own where none of the system comes first.
DEFAULT_SYSTEM = (
    LOOP + "{% if loop.first and messages[0].role != 'system' %}<system>You assist|\n{% endif %}"
    "<{{ m.role }}>{{ m.content }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen's, which looks at a first message before there is one.
FIRST_SEEN = (
    "{% if messages[0].role != 'system' %}<system>You assist|\n{% endif %}"
    + LOOP
    + "<{{ m.role }}>"
    "{{ m.content }}|\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("source", [DEFAULT_SYSTEM, FIRST_SEEN])
def test_an_answer_that_begins_a_conversation_is_trained_without_what_is_before_it(
    tokenizer: Tokenizer, source: str
) -> None:
    expected = "<system>You assist|\n<assistant>[a|]\n<user>q|\n<assistant>[b|]\n"
    assert marked(source, TWO[1:], tokenizer) == expected


def test_a_turn_that_is_ended_by_what_follows_has_its_end(tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{% if not loop.first %}</s>\n{% endif %}<{{ m.role }}>"
        "{{ m.content }}{% endfor %}{{ '</s>\n' }}"
    )
    template = ChatTemplate(source, tokenizer)
    text, spans, _ = template.mark(TWO, {3})
    assert [text[begin:end] for begin, end in spans] == ["<assistant>b</s>"]


def test_special_tokens_in_a_message_are_text(each: Tokenizer) -> None:
    special = max(each.special_tokens, key=len)
    template = ChatTemplate(
        LOOP + f"{special}{{{{ m.role }}}}\n{{{{ m.content }}}}{{% endfor %}}", each
    )
    said = [{"role": "user", "content": f"x {special} y"}, {**SAY, "content": f"{special}z"}]
    encoded = template.encode(said, {1})
    number = each.special_tokens[special]
    assert encoded.ids.count(number) == 2  # those of the template
    assert template.encode_prompt(said).count(number) == 2
    shown = each.stream(special=True)
    text = "".join(shown.push(i) for i in encoded.ids) + shown.flush()
    assert text.strip() == encoded.text.strip()
    plain = [{"role": "user", "content": "x y"}, SAY]
    text = template.render(plain)
    assert template.encode(plain, {1}).ids == each.encode(text, special=True)


@pytest.mark.parametrize(
    "text", ["", "a\n\n b", "\u00e9\U0001f600 x", "  two  spaces", "\u2581 x", "x" * 200]
)
def test_spans_cover_the_text_in_order(each: Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    for made in (each, tokenizer):
        special = next(iter(made.special_tokens))
        whole = f"{special}{text}{special}\n{text}"
        ids, spans = made.encode_with_spans(whole)
        assert ids == made.encode(whole, special=True)
        assert spans == sorted(spans) and spans[0][0] == 0
        assert spans[-1][1] == len(whole)
        numbers = [n for n, token in enumerate(ids) if token == made.special_tokens[special]]
        assert [whole[slice(*spans[n])].strip() for n in numbers] == [special] * 2


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_train_the_same_without_their_marks(
    tokenizer: Tokenizer, name: str
) -> None:
    own = named_template(name, tokenizer)
    plain = ChatTemplate(portable_template(name, tokenizer), tokenizer)
    assert "generation %" not in plain.source
    assert own.mark(TWO, {1, 3}) == plain.mark(TWO, {1, 3})
    assert own.render(TWO).startswith("<s>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "line 1: not a Jinja template: Unexpected end of template"),
        ("{{ raise_exception('no system') }}", "refuses the row: no system"),
        ("{{ messages[0].missing.other }}", "refuses the row: "),
        ("{{ ''.__class__.__mro__ }}", "refuses the row: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses the row: "),
        ("{{ 'x' * 10000000 }}", "refuses the row: a text is repeated too often"),
        ("{{ 9 ** 99999 }}", "refuses the row: a power is too large"),
        ("{{ '%99999999d' % 1 }}", "refuses the row: a width is too large"),
        ("{% for i in range(9999999) %}x{% endfor %}", "fails on the row: OverflowError"),
    ],
)
def test_a_template_cannot_do_harm(tokenizer: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        ChatTemplate(source, tokenizer).render(TWO)
    assert message in str(error.value) and len(str(error.value)) < 400


def test_templates_know_what_transformers_gives_them(tokenizer: Tokenizer) -> None:
    source = (
        "{{ bos_token }}{{ tools | tojson }}{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}"
        "{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    template = ChatTemplate(source, tokenizer)
    assert template.render([ASK], tools=[{"a": "\u00e9<"}]) == '<s>[{"a": "\u00e9<"}]134</s>'
