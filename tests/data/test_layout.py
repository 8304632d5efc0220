"""Rows of conversations: whole, masked, side by side without seeing each other."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data.batches import Batch, Batches, layout_of, prepare, sequential
from tinyllama.data.conversations import Form
from tinyllama.data.corpus import TokenDataset
from tinyllama.data.layout import Pieces, trimmed
from tinyllama.errors import DataError
from tinyllama.tokenizers.tokenizer import Tokenizer

FORM = Form(template="chatml")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chats(answers: list[str]) -> list[dict[str, object]]:
    return [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


def dataset_of(
    rows: list[dict[str, object]], tokenizer: Tokenizer, form: Form = FORM
) -> TokenDataset:
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare("chat.jsonl", tokenizer, "cache", form=form, workers=1, progress=False)


def documents(dataset: TokenDataset) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each."""
    ends = [*dataset.starts[1:].tolist(), dataset.n_tokens]
    assert dataset.trained is not None
    return [
        (dataset.tokens[a:b].tolist(), dataset.trained[a:b].tolist())
        for a, b in zip(dataset.starts.tolist(), ends, strict=True)
    ]


def pieces_of(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of everything that stands in the rows, by where documents begin."""
    found = []
    for batch in batches:
        for tokens, targets, starts in zip(*(part.tolist() for part in batch), strict=True):
            for start in sorted(set(starts)):
                place = [k for k, value in enumerate(starts) if value == start]
                if len(place) > 1:  # padding stands alone
                    found.append(
                        (tuple(tokens[k] for k in place), tuple(targets[k] for k in place))
                    )
    return found


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    context_length=st.integers(60, 150),
    pack=st.booleans(),
    batch_size=st.integers(1, 3),
)
def test_each_conversation_stands_in_a_row_once_cut_at_its_end_and_masked(
    tokenizer: Tokenizer, sizes: list[int], context_length: int, pack: bool, batch_size: int
) -> None:
    dataset = dataset_of(chats(["x" * n + str(k) for k, n in enumerate(sizes)]), tokenizer)
    batches = Batches(dataset, context_length, batch_size, seed=3, pack=pack)
    seen = pieces_of([batches.next() for _ in range(batches.steps_per_epoch)])
    expected = []
    for ids, mask in documents(dataset):
        ids, mask = ids[:context_length], mask[:context_length]
        targets = [t if on else -1 for t, on in zip(ids[1:], mask[1:], strict=True)] + [-1]
        if any(target >= 0 for target in targets):
            expected.append((tuple(ids), tuple(targets)))
    assert sorted(seen) == sorted(expected)
    assert batches.epoch == 1


def test_packing_leaves_little_room_and_its_rows_stay_the_same(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(0)
    dataset = dataset_of(chats(["y" * n for n in generator.integers(1, 90, 400)]), tokenizer)
    layout, again = layout_of(dataset, 256), layout_of(dataset, 256)
    assert layout.n_rows < 1.03 * dataset.n_tokens / 256 + 1
    rows = np.arange(layout.n_rows)
    first, second = (each.batch(rows, layout.n_rows) for each in (layout, again))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_cut_answer_is_counted_and_one_cut_away_is_left_out(tokenizer: Tokenizer) -> None:
    rows = chats(["a", "b" * 500])
    rows += [{"messages": [{"role": "user", "content": "c" * 500}, *chats(["d"])[0]["messages"]]}]  # type: ignore[misc]
    rows += [{"messages": [{"role": "user", "content": "nobody answers"}]}]
    dataset = dataset_of(rows, tokenizer)
    assert (dataset.n_documents, dataset.n_dropped) == (3, 1)
    layout = layout_of(dataset, 100)
    assert layout.notices() == [
        "chat.jsonl: 1 of 3 conversations are longer than 100 tokens: their ends are cut off "
        "(data.context_length)",
        "chat.jsonl: 2 of 4 conversations have no token that is trained and are left out "
        "(data.train_on, data.context_length)",
    ]
    trained = sum(int((batch.targets >= 0).sum()) for batch in sequential(dataset, 100, 2))
    (first, mask), (cut, cut_mask), _ = documents(dataset)
    assert trained == sum(mask) + sum(cut_mask[:100])
    assert len(first) < 100 < len(cut)


def test_text_without_packing_goes_on_in_another_row_and_loses_nothing(
    tokenizer: Tokenizer,
) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": "w " * n}) + "\n" for n in (3, 40, 9)))
    dataset = prepare("a.jsonl", tokenizer, "cache", workers=1, progress=False)
    layout = layout_of(dataset, 16, pack=False)
    assert isinstance(layout, Pieces) and layout.notices() == []
    batch = layout.batch(np.arange(layout.n_rows), layout.n_rows)
    assert int((batch.targets >= 0).sum()) == dataset.n_tokens - dataset.n_documents
    assert (batch.starts[:, 0] == 0).all() and all(len(set(row[row < 16])) for row in batch.starts)


def test_rows_of_similar_length_come_together_and_each_once(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(1)
    answers = ["z" * int(n) for n in generator.integers(1, 200, 300)]
    dataset = dataset_of(chats(answers), tokenizer)
    batches = Batches(dataset, 320, 8, seed=5, pack=False)
    lengths, seen = [], 0
    for _ in range(batches.steps_per_epoch):
        batch = batches.next()
        used = [int((row >= 0).nonzero()[0].max(initial=0)) for row in batch.targets]
        lengths.append([n for n in used if n])
        seen += len(lengths[-1])
    assert seen == 300
    spread = np.mean([max(row) - min(row) for row in lengths])
    assert spread < 30 and np.std([max(row) for row in lengths]) > 30
    order = [row[0] for row in lengths]
    assert order != sorted(order)


def test_trimming_takes_padding_alone(tokenizer: Tokenizer) -> None:
    dataset = dataset_of(chats(["a", "b" * 40]), tokenizer)
    layout = layout_of(dataset, 800, pack=False)
    batch = layout.batch(np.arange(2), 2)
    small = trimmed(batch)
    assert small.tokens.shape == (2, 200)
    assert (small.targets >= 0).sum() == (batch.targets >= 0).sum() > 0
    assert all((a == b[:, :200]).all() for a, b in zip(small, batch, strict=True))
    assert trimmed(layout_of(dataset, 60, pack=False).batch(np.arange(2), 2)).tokens.shape[1] == 60


def test_a_place_in_the_data_is_of_one_way_of_packing(tokenizer: Tokenizer) -> None:
    dataset = dataset_of(chats(["a", "b"]), tokenizer)
    state = Batches(dataset, 64, 1, seed=0, pack=False).state()
    Batches(dataset, 64, 1, seed=0, pack=False).restore(state)
    with pytest.raises(DataError, match="its pack is False, here it is True"):
        Batches(dataset, 64, 1, seed=0).restore(state)


def test_conversations_do_not_overlap(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no stride"):
        layout_of(dataset_of(chats(["a"]), tokenizer), 64, stride=32)


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_says_which_conversations_it_held(pack: bool, tokenizer: Tokenizer) -> None:
    dataset = dataset_of(chats([f"{'word ' * (i + 1)}{i}" for i in range(9)]), tokenizer)
    batches = Batches(dataset, 150, 2, seed=3, pack=pack)
    seen = set()
    for _ in range(batches.steps_per_epoch):
        batch = batches.next()
        assert isinstance(batch, Batch)
        texts = {tokens for tokens, _ in pieces_of([batch])}
        expected = {
            number
            for number, (ids, _) in enumerate(documents(dataset))
            if any(tokens == tuple(ids[: len(tokens)]) for tokens in texts)
        }
        assert set(batches.documents().tolist()) == expected
        seen |= expected
    assert seen == set(range(9)) and not batches.is_text
