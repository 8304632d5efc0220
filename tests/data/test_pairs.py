"""Pairs of answers as rows of tokens: prompts, masks, what is cut and what is left out."""

import json

import numpy as np
import pytest
from data_helpers import small_tokenizer

from tinyllama.data.batches import Batches
from tinyllama.data.conversations import Form
from tinyllama.data.corpus import Part, prepare
from tinyllama.data.pairs import prepare_pairs
from tinyllama.errors import DataError

PAIR = {"prompt": "def add(first,", "chosen": " second):  # code", "rejected": " code"}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(rows, context=40, name="pairs.jsonl", text=None):
    data = "".join(json.dumps(row) + "\n" for row in rows) if text is None else text
    with open(name, "w", encoding="utf-8", newline="") as file:
        file.write(data)
    return prepare_pairs(name, small_tokenizer(), "cache", context, progress=False)


def texts(batch, row):
    """The row's text without its end, that of its targets, and the end."""
    tokenizer = small_tokenizer()
    there = batch.tokens[row][batch.starts[row] == 0].tolist()
    targets = [i for i in batch.targets[row].tolist() if i >= 0]
    assert there[-1] == tokenizer.eos_id
    return tokenizer.decode(there[1:-1]), tokenizer.decode(targets[:-1]), targets[-1]


def test_answers_are_trained_with_their_end_and_prompts_are_not():
    batch = load([PAIR]).batch(np.array([0]), 2)
    assert batch.tokens.shape == (4, 40)
    assert texts(batch, 0) == ("def add(first, second):  # code", "second):  # code", 2)
    assert texts(batch, 1) == ("def add(first, code", "code", 2)
    assert (batch.targets[2:] == -1).all()
    assert batch.tokens[0, 0] == small_tokenizer().bos_id
    for row in (0, 1):  # each target is the token behind
        at = np.flatnonzero(batch.targets[row] >= 0)
        assert (batch.tokens[row, at[1:]] == batch.targets[row, at[:-1]]).all()


@pytest.mark.parametrize("cut", ["def add(first,", "def add("])
def test_a_prompt_that_is_not_given_is_what_both_begin_with(cut):
    chosen, rejected = f"{cut} first):  # code", f"{cut} second code"
    dataset = load([{"chosen": chosen, "rejected": rejected}])
    batch = dataset.batch(np.array([0]), 1)
    assert texts(batch, 0)[:2] == (chosen, "first):  # code")
    assert texts(batch, 1)[:2] == (rejected, "second code")


def test_long_answers_are_cut_and_what_says_nothing_is_left_out():
    long = {**PAIR, "chosen": " code" * 30}
    full = {**PAIR, "prompt": "def add" * 40}
    same = {**PAIR, "rejected": PAIR["chosen"]}
    dataset = load([long, full, same, PAIR], context=24)
    assert dataset.n_rows == 2
    assert dataset.notices() == [
        "pairs.jsonl: 1 pairs left out: both answers are the same, or one is empty",
        "pairs.jsonl: 1 pairs left out: the prompt alone fills the context of 24 tokens",
        "pairs.jsonl: 1 pairs cut to the context of 24 tokens",
    ]
    batch = dataset.batch(np.array([0, 1]), 2)
    assert batch.targets[0, -1] >= 0 and (batch.starts[0] == 0).all()
    assert ((batch.targets >= 0).any(1)).all()


def test_rows_are_the_same_from_an_array_and_from_lines_of_any_end():
    rows = [{**PAIR, "chosen": f" code {i}\u2028"} for i in range(4)]
    lines = load(rows)
    array = load(rows, name="pairs.json", text=json.dumps(rows, indent=1))
    other_ends = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    windows = load(rows, name="windows.jsonl", text=other_ends)
    for dataset in (array, windows):
        assert (dataset.tokens == lines.tokens).all() and (dataset.places == lines.places).all()


def test_a_bad_row_is_named_by_its_line():
    with pytest.raises(DataError, match=r'pairs\.jsonl, line 3: no "chosen" and "rejected"'):
        load([], text=f"{json.dumps(PAIR)}\n\n" + '{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 2: "):
        load([PAIR, {**PAIR, "chosen": "\ud800"}])


def test_messages_are_written_by_a_template_and_their_last_turn_is_trained():
    before = [{"role": "user", "content": "def add"}]
    answers = [[*before, {"role": "assistant", "content": text}] for text in ("first", "second")]
    with open("chat.jsonl", "w") as file:
        file.write(json.dumps(dict(zip(("chosen", "rejected"), answers, strict=True))) + "\n")
    form = Form("chatml")
    dataset = prepare_pairs(
        "chat.jsonl", small_tokenizer(), "cache", 150, form=form, progress=False
    )
    batch, tokenizer = dataset.batch(np.array([0]), 1), small_tokenizer()
    for row, text in enumerate(("first", "second")):
        trained = tokenizer.decode(batch.targets[row][batch.targets[row] >= 0].tolist())
        assert trained.strip() == f"{text}<|im_end|>"
        whole = tokenizer.decode(batch.tokens[row][batch.starts[row] == 0].tolist())
        assert "def add" in whole
    with pytest.raises(DataError, match="messages need a chat template"):
        prepare_pairs("chat.jsonl", small_tokenizer(), "cache", 150, progress=False)


def test_odds_batches_weigh_each_token():
    rows = [PAIR, {**PAIR, "chosen": " first"}]
    dataset = load(rows)
    plain, odds = (make(np.array([0, 1]), 3) for make in (dataset.batch, dataset.odds_batch))
    is_answer = plain.targets >= 0
    assert (odds.tokens == plain.tokens).all() and (odds.starts == plain.starts).all()
    assert ((odds.answer > 0) == is_answer).all()
    assert odds.answer.sum(1) == pytest.approx([1, 1, 1, 1, 0, 0])
    for row in (0, 2):  # a chosen row: each token but the first, and the end
        lengths = int((plain.starts[row] == 0).sum())
        assert (odds.targets[row, : lengths - 1] == plain.tokens[row, 1:lengths]).all()
        assert (odds.targets[row, lengths - 1 :] == -1).all()
    assert (odds.targets[1] == plain.targets[1]).all() and not odds.text[[1, 3]].any()
    trained = (odds.targets >= 0) & (np.arange(6) % 2 == 0)[:, None]
    assert ((odds.text > 0) == trained).all()
    assert odds.text.sum() == pytest.approx(2)


def test_an_order_of_pairs_is_resumed():
    dataset = load([{**PAIR, "chosen": f" code {i}"} for i in range(7)])
    one, other = (Batches(dataset, 40, 2, seed=5, layout=dataset) for _ in range(2))
    one.next()
    other.restore(one.state())
    assert one.n_windows == 7 and one.steps_per_epoch == 4
    for _ in range(6):
        assert (one.next().tokens == other.next().tokens).all()


def test_a_batch_says_which_pairs_it_held_among_all():
    full = {**PAIR, "prompt": "def add" * 40}
    dataset = load([full, *({**PAIR, "chosen": f" code {i}"} for i in range(4))])
    batches = Batches(dataset, 40, 4, seed=5, layout=dataset)
    batches.next()
    assert batches.documents().tolist() == [1, 2, 3, 4] and not batches.is_text


def test_parts_share_no_pair_and_are_those_of_supervised_training_on_the_same_file():
    rows = [{"id": n, **PAIR, "chosen": f" code {n % 100}"} for n in range(300)]
    load(rows)
    tokenizer, parts = small_tokenizer(), (Part(0.25, rest=True), Part(0.25, rest=False))
    made = [
        prepare_pairs("pairs.jsonl", tokenizer, "cache", 40, part=part, progress=False)
        for part in parts
    ]

    def chosen(pairs):
        return [tuple(pairs.tokens[at : at + n, 0].tolist()) for at, n in pairs.places[:, :2]]

    train, val = map(chosen, made)
    assert not set(train) & set(val) and len(train) + len(val) == 300
    assert len(val) % 3 == 0 and 45 < len(val) < 105
    for pairs, part in zip(made, parts, strict=True):
        answers = prepare("pairs.jsonl", tokenizer, "cache", part=part, progress=False)
        ends = [*answers.starts[1:].tolist(), answers.n_tokens]
        documents = [
            tuple(answers.tokens[begin:end].tolist())
            for begin, end in zip(answers.starts.tolist(), ends, strict=True)
        ]
        assert documents == chosen(pairs)
    with pytest.raises(DataError, match="val_fraction = 1e-09 leaves no row for validation"):
        prepare_pairs("pairs.jsonl", tokenizer, "cache", 40, part=Part(1e-9, rest=False))
