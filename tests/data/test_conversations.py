"""Conversations in the forms that people have: which tokens are trained, what is refused where."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import small_tokenizer

from tinyllama.data import packed
from tinyllama.data.conversations import Conversation, Encoder, Form, TrainOn, kind_of, parse
from tinyllama.data.corpus import Part, TokenDataset, prepare
from tinyllama.errors import DataError
from tinyllama.tokenizers.files import TEMPLATE_FILE
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.tokenizer import Tokenizer

CHATML = Form(template="chatml")
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(row: dict[str, object], tokenizer: Tokenizer, form: Form = CHATML) -> str:
    """The text of a row, what is trained of it between [ and ]."""
    kind = kind_of(row)
    assert kind is not None
    encoded = Encoder(tokenizer, form)(parse(row, kind)[0])
    stream = tokenizer.stream(special=True)
    out, inside = "", False
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained != inside:
            out, inside = out + "[]"[inside], trained
        out += stream.push(token)
    return out + "]" * inside


@pytest.mark.parametrize("train_on", [None, "assistant", "last"])
def test_the_end_of_a_turn_is_trained_and_the_line_end_is_not(
    tokenizer: Tokenizer, train_on: TrainOn | None
) -> None:
    text = shown({"messages": TURNS}, tokenizer, Form("chatml", train_on))
    system, first, one, second, two = (
        "<s><|im_start|>system\ns<|im_end|>\n",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
        "a1<|im_end|>",
        "\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
        "[a2<|im_end|>]\n",
    )
    one = one if train_on == "last" else f"[{one}]"
    assert text == system + first + one + second + two


def test_all_is_all(tokenizer: Tokenizer) -> None:
    text = shown({"messages": TURNS}, tokenizer, Form("chatml", "all"))
    assert text.startswith("[<s><|im_start|>system") and text.endswith("<|im_end|>\n]")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p ", "completion": "c"}, "<s>p [c</s>]"),
        ({"prompt": "", "completion": "c"}, "<s>[c</s>]"),
        (
            {"instruction": "do", "input": "", "output": "o", "text": "all of it"},
            "<s>Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\ndo\n\n### Response:\n[o</s>]",
        ),
        (
            {"instruction": "do", "input": "with", "output": "o"},
            "<s>Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\ndo\n\n### Input:\nwith\n\n### Response:\n[o</s>]",
        ),
        ({"chosen": "the sky is blue", "rejected": "the sky is red"}, "<s>the sky is [blue</s>]"),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: yo"},
            "<s>\n\nHuman: x\n\nAssistant:[ y</s>]",
        ),
    ],
)
def test_rows_without_roles_need_no_template(
    tokenizer: Tokenizer, row: dict[str, object], expected: str
) -> None:
    assert shown(row, tokenizer, Form()) == expected


CHAT = "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n"
QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "q", "completion": [ANSWER]},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT ", "value": "a"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "b"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
    ],
)
def test_every_form_of_a_question_and_an_answer_is_the_same(
    tokenizer: Tokenizer, row: dict[str, object]
) -> None:
    assert shown(row, tokenizer) == CHAT


def test_answers_in_a_prompt_and_answers_of_weight_0_are_not_trained(tokenizer: Tokenizer) -> None:
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}
    assert shown(row, tokenizer).count("[") == 1
    weighted = {"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "weight": 1}]}
    assert shown(weighted, tokenizer) == shown(row, tokenizer)


@pytest.mark.parametrize("row", [
    {"messages": [QUESTION, {**ANSWER, "content": ""}, QUESTION, ANSWER]},
    {"messages": [QUESTION, {**ANSWER, "content": " \n"}, QUESTION, ANSWER]},
])  # fmt: skip
def test_an_answer_that_says_nothing_is_not_trained(
    tokenizer: Tokenizer, row: dict[str, object]
) -> None:
    text = shown(row, tokenizer)
    assert text.count("[") == 1 and "[a<|im_end|>]" in text
    assert "[" not in shown({"prompt": "q", "completion": ""}, tokenizer)


def test_calls_that_a_template_leaves_out_are_an_error(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "q", "arguments": "{}"}}
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "{% for m in messages %}{{ m.content or '' }}{{ m.tool_calls }}|{% endfor %}"
    for template, fails in ((source.replace("{{ m.tool_calls }}", ""), True), (source, False)):
        files = {**tokenizer.sources, TEMPLATE_FILE: template.encode()}
        with_template = from_files(files, "with a template")
        if fails:
            with pytest.raises(DataError, match=r"^a\.jsonl, line 1: the model's chat template "
                               r"leaves out the tool calls of message 2"):  # fmt: skip
                load(with_template, "a.jsonl", Form())
        else:
            assert load(with_template, "a.jsonl", Form()).n_documents == 1


def test_a_preference_is_two_conversations_after_one_prompt() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    chosen, rejected = parse(row, "preference")
    assert [c.messages[-1]["content"] for c in (chosen, rejected)] == ["good", "bad"]
    assert chosen.messages[0] == rejected.messages[0] and chosen.first_trained == 1


def test_tools_and_calls_reach_the_template(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = {
        "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([{"name": "f"}]),
    }
    (conversation,) = parse(rows, "messages")
    assert conversation.tools == [{"name": "f"}]
    share = {
        "conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]
    }
    (called,) = parse(share, "sharegpt")
    assert called.messages[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, '"messages" is empty'),
        ({"messages": 3}, '"messages" must be a list of messages, got int'),
        ({"messages": ["a"]}, 'messages[0]: must be an object {"role": ..., "content": ...}'),
        ({"messages": [{"content": "a"}]}, "messages[0]: role: got None, must be system, user,"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0]: role: got 'bot', must be"),
        ({"messages": [{"role": "user"}]}, "messages[0]: has no content"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": 3}]},
            "messages[1]: content must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]: holds a part of type 'image_url', not text",
        ),
        ({"prompt": "a", "completion": 3}, '"completion" must be a text, got int'),
        ({"instruction": "a", "output": None}, '"output" must be a text, got NoneType'),
        ({"chosen": "a", "rejected": []}, '"chosen" and "rejected" must both be texts or both'),
        ({"messages": [QUESTION], "tools": "x"}, '"tools" must be a list, got str'),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "holds half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(
    tokenizer: Tokenizer, row: dict[str, object], message: str
) -> None:
    good = {key: "x" if isinstance(value, str) else value for key, value in row.items()}
    good = {"messages": [QUESTION, ANSWER]} if "messages" in row else good | {
        key: "x" for key in ("completion", "output", "rejected", "chosen") if key in row
    }  # fmt: skip
    Path("a.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DataError) as error:
        load(tokenizer, "a.jsonl")
    assert str(error.value).startswith(f"a.jsonl, line 3: {message}")
    assert len(str(error.value).splitlines()) == 1


def load(
    tokenizer: Tokenizer, name: str, form: Form = CHATML, part: Part | None = None, workers: int = 1
) -> TokenDataset:
    return prepare(name, tokenizer, "cache", form=form, part=part, workers=workers, progress=False)


def test_messages_without_a_template_say_what_to_set(tokenizer: Tokenizer) -> None:
    Path("a.jsonl").write_text(json.dumps({"messages": TURNS}))
    with pytest.raises(DataError, match=r"^a\.jsonl, line 1: messages need a chat temp.*chatml"):
        load(tokenizer, "a.jsonl", Form())


def test_what_a_template_refuses_or_leaves_out_is_named(tokenizer: Tokenizer) -> None:
    twice = [TURNS[0], TURNS[0], *TURNS[1:]]
    Path("a.jsonl").write_text(json.dumps({"messages": twice}))
    with pytest.raises(DataError, match=r"^a\.jsonl, line 1: the template llama2 refuses the row"):
        load(tokenizer, "a.jsonl", Form("llama2"))
    assert load(tokenizer, "a.jsonl").n_documents == 1  # ChatML writes both


@pytest.mark.parametrize(
    "data",
    [
        "\ufeff" + json.dumps({"messages": TURNS}),
        json.dumps({"messages": TURNS}) + "\r\n\r\n",
        json.dumps([{"messages": TURNS}], indent=2),
        "\n\n" + json.dumps({"id": 1, "messages": TURNS}),
    ],
)
def test_marks_of_order_and_line_ends_change_nothing(tokenizer: Tokenizer, data: str) -> None:
    Path("a.json").write_text(data, newline="")
    Path("plain.jsonl").write_text(json.dumps({"messages": TURNS}))
    expected = load(tokenizer, "plain.jsonl").tokens.tobytes()
    assert load(tokenizer, "a.json").tokens.tobytes() == expected


def test_lines_end_at_line_feeds_alone(tokenizer: Tokenizer) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": "a\u2028b\x85c"}]}] * 2
    Path("a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    assert load(tokenizer, "a.jsonl").n_documents == 2


def test_rows_are_the_same_in_every_container(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"p{n} \u00e9", "completion": f"c{n}\n"} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("a.jsonl").write_text(lines)
    Path("a.json").write_text(json.dumps(rows))
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pyarrow.CompressedOutputStream("a.jsonl.zst", "zstd") as out:
        out.write(lines.encode())
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    Path("a.csv").write_text(table.getvalue())
    Path("a.csv.gz").write_bytes(gzip.compress(table.getvalue().encode()))
    wide = [{**row, "embedding": [0.5]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wide), "a.parquet", row_group_size=7)
    expected = load(tokenizer, "a.jsonl")
    for name in ("a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.parquet"):
        found = load(tokenizer, name)
        assert found.tokens.tobytes() == expected.tokens.tobytes(), name
        assert found.trained is not None and expected.trained is not None
        assert found.trained.tobytes() == expected.trained.tobytes(), name
    assert not list(Path("cache").glob(".*"))
    Path("d").mkdir()
    for name in ("a.jsonl.gz", "a.parquet", "a.csv"):
        Path(name).rename(Path("d") / name)
    assert load(tokenizer, "d").n_documents == 90


def test_nested_messages_of_parquet_are_read(tokenizer: Tokenizer) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TURNS}] * 3), "a.parquet")
    Path("a.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 3)
    assert (
        load(tokenizer, "a.parquet").tokens.tobytes() == load(tokenizer, "a.jsonl").tokens.tobytes()
    )
    bad = [{"messages": TURNS}, {"messages": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad), "bad.parquet")
    with pytest.raises(DataError, match=r'^bad\.parquet, row 2: "messages" is empty'):
        load(tokenizer, "bad.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:40], "a.jsonl.gz: damaged"),
        ("a.gz", gzip.compress(gzip.compress(b"x")), "a.gz: is packed twice; unpack it first"),
        ("a.gz", gzip.compress(b"PK\x03\x04"), "a.gz: is a zip archive, which is not read"),
        ("a.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 9, "a.zst: damaged: "),
        ("a.parquet", b"PAR1" + b"\0" * 20 + b"PAR1", "a.parquet: damaged: "),
    ],
    ids=["cut", "packed twice", "a zip archive", "zeros for zstd", "zeros for Parquet"],
)  # fmt: skip
def test_damaged_archives_are_named(
    tokenizer: Tokenizer, name: str, data: bytes, message: str
) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(DataError) as error:
        load(tokenizer, name)
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) == 1


def test_without_pyarrow_the_extra_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'tinyllama-trainer\[parquet\]'"):
        packed.parquet_kind(Path("a.parquet"))


def test_parts_share_no_row_and_rows_that_say_the_same_stay_together(tokenizer: Tokenizer) -> None:
    rows = [{"id": n, "prompt": f"p{n % 200}", "completion": "c"} for n in range(600)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, val = (load(tokenizer, "a.jsonl", Form(), Part(0.25, rest)) for rest in (True, False))
    assert train.n_documents + val.n_documents == 600
    assert val.n_documents % 3 == 0 and 90 < val.n_documents < 210
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert load(tokenizer, "b.jsonl", Form(), Part(0.25, False)).n_documents == val.n_documents
    with pytest.raises(DataError, match="val_fraction = 1e-09 leaves no row for validation"):
        load(tokenizer, "a.jsonl", Form(), Part(1e-9, False))
    Path("one.txt").write_text("prose")
    with pytest.raises(DataError, match=r"one\.txt: is one text, and data\.val_fraction splits"):
        load(tokenizer, "one.txt", Form(), Part(0.5, False))


def test_masks_are_kept_with_a_sum_and_do_not_depend_on_workers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinyllama.data.files.CHUNK_BYTES", 500)
    Path("a.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 40)
    one = load(tokenizer, "a.jsonl")
    assert one.trained is not None
    kept = one.trained.tobytes()
    (one.path / "trained.bin").write_bytes(bytes(len(kept)))
    again = load(tokenizer, "a.jsonl", workers=2)
    assert again.trained is not None and again.trained.tobytes() == kept
    assert "its sum does not hold; the text is tokenized again" in capsys.readouterr().err


def test_other_forms_have_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    Path("a.jsonl").write_text(json.dumps({"messages": TURNS}))
    forms = [CHATML, Form("llama3"), Form("chatml", "last"), Form("chatml", "all")]
    assert len({load(tokenizer, "a.jsonl", form).path for form in forms}) == 4


def test_rows_that_train_nothing_are_dropped_and_a_file_of_them_refused(
    tokenizer: Tokenizer,
) -> None:
    Path("a.jsonl").write_text(json.dumps({"messages": [QUESTION]}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: none of its 1 rows has a token that is"):
        load(tokenizer, "a.jsonl")
    Path("t.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(DataError, match=r"holds text, in which nobody speaks: set data\.train_on"):
        load(tokenizer, "t.jsonl", Form(None, "last"))


def test_a_conversation_is_hashed_by_what_it_says() -> None:
    one, other = Conversation([QUESTION]), Conversation([dict(reversed(QUESTION.items()))])
    assert one.digest_bytes == other.digest_bytes != Conversation([ANSWER]).digest_bytes
