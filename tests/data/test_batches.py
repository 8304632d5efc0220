"""Batches: what a model sees, in which order, and where a run goes on."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import LINE, load, small_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data.batches import (
    Batch,
    Batches,
    TokenDataset,
    sequential,
)
from tinyllama.errors import DataError
from tinyllama.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_dataset(tokenizer: Tokenizer, texts: list[str]) -> TokenDataset:
    write("batches.jsonl", texts)
    return load(tokenizer, "batches.jsonl")


def trained_pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    """(token, target) wherever there is a target."""
    pairs = []
    for batch in batches:
        is_trained = batch.targets >= 0
        pairs += zip(
            batch.tokens[is_trained].tolist(), batch.targets[is_trained].tolist(), strict=True
        )
    return pairs


def expected_pairs(dataset: TokenDataset) -> list[tuple[int, int]]:
    tokens = dataset.tokens.tolist()
    return [pair for pair in itertools.pairwise(tokens) if pair[0] != dataset.eos_id]


def test_one_window_holds_what_a_model_must_see(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer, ["12", "3"])
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    one, two = tokenizer.encode("12"), tokenizer.encode("3")
    text = [bos, *one, eos, bos, *two, eos]
    assert dataset.tokens.tolist() == text
    (batch,) = sequential(dataset, len(text) + 2, 1)  # with two padded tokens behind
    second, end = len(one) + 2, len(text)
    assert batch.tokens.tolist() == [[*text, eos, eos]]
    assert batch.targets.tolist() == [[*one, eos, -1, *two, eos, -1, -1, -1]]
    assert batch.starts.tolist() == [[0] * second + [second] * (end - second) + [end, end + 1]]
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab1 \n"), min_size=1, max_size=30), min_size=1),
    context_length=st.integers(2, 12),
    batch_size=st.integers(1, 5),
)
def test_each_epoch_trains_on_every_token_once(
    tokenizer: Tokenizer, texts: list[str], context_length: int, batch_size: int
) -> None:
    dataset = make_dataset(tokenizer, texts * 4)
    batches = Batches(dataset, context_length, batch_size, seed=1)
    for epoch in range(2):
        assert batches.epoch == epoch
        epoch_batches = [batches.next() for _ in range(batches.steps_per_epoch)]
        assert sorted(trained_pairs(epoch_batches)) == sorted(expected_pairs(dataset))
        for batch in epoch_batches:
            assert batch.tokens.shape == (batch_size, context_length)
            assert (batch.targets >= 0).any(), "a step without a target would divide by zero"
            check_starts(batch, tokenizer)
    assert trained_pairs(list(sequential(dataset, context_length, batch_size))) == expected_pairs(
        dataset
    )
    assert dataset.n_tokens - dataset.n_documents == len(expected_pairs(dataset))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab1 \n"), min_size=1, max_size=30), min_size=1),
    lengths=st.integers(2, 12).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))),
    batch_size=st.integers(1, 5),
)
def test_overlapping_windows_predict_every_token_once_from_enough_text(
    tokenizer: Tokenizer, texts: list[str], lengths: tuple[int, int], batch_size: int
) -> None:
    dataset = make_dataset(tokenizer, texts)
    batches = list(sequential(dataset, lengths[0], batch_size, lengths[1]))
    assert trained_pairs(batches) == expected_pairs(dataset)
    later_rows = np.concatenate([batch.targets for batch in batches])[1:]
    assert (later_rows[:, : lengths[0] - lengths[1]] == -1).all()
    count = dataset.window_count(*lengths)
    assert -(-count // batch_size) == len(batches) and len(later_rows) >= count - 1


def check_starts(batch: Batch, tokenizer: Tokenizer) -> None:
    """Against the definition, token by token; a padded token sees only itself."""
    for tokens, targets, starts in zip(*batch, strict=True):
        start = 0
        for position, token in enumerate(tokens):
            after_end = position > 0 and tokens[position - 1] == tokenizer.eos_id
            if token == tokenizer.bos_id or (token == tokenizer.eos_id and after_end):
                start = position
            if token == tokenizer.eos_id:
                assert targets[position] == -1
            if position < len(tokens) - 1 and targets[position] >= 0:
                assert targets[position] == tokens[position + 1]
            assert starts[position] == start


def test_epochs_are_shuffled_by_seed_and_epoch_alone(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer, [LINE * 20])

    def order(seed: int, *, shuffle: bool = True) -> list[list[list[int]]]:
        batches = Batches(dataset, 4, 8, seed, shuffle)
        steps = range(2 * batches.steps_per_epoch)
        rows = [batches.next().tokens.tolist() for _ in steps]
        flat = [row for batch in rows for row in batch]
        return [flat[: len(flat) // 2], flat[len(flat) // 2 :]]

    first = order(0)
    assert first == order(0)
    assert first[0] != first[1]
    assert first != order(1)
    plain = order(0, shuffle=False)
    assert plain[0] == plain[1] != first[0]
    assert list(itertools.chain(*plain[0]))[: dataset.n_tokens - 1] == dataset.tokens.tolist()[:-1]


def test_the_order_is_the_same_on_every_machine(tokenizer: Tokenizer) -> None:
    batches = Batches(make_dataset(tokenizer, ["1234567890" * 4]), 4, 1, seed=7)
    assert batches._make_order().tolist() == [6, 3, 4, 10, 9, 0, 2, 8, 7, 5, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_gives_the_batches_that_were_to_come(tokenizer: Tokenizer, shuffle: bool) -> None:
    dataset = make_dataset(tokenizer, [LINE * 10, "more " * 30])

    def make(batch_size: int = 3) -> Batches:
        return Batches(dataset, 8, batch_size, seed=3, shuffle=shuffle)

    batches = make()
    steps = 2 * batches.steps_per_epoch + 2
    states, made = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(batches.state())))
        made.append(batches.next())
    for step, state in enumerate(states):
        resumed = make()
        resumed.next()
        resumed.restore(state)
        assert resumed.state() == state
        for batch in made[step : step + 3]:
            assert all(map(np.array_equal, resumed.next(), batch))


def test_resuming_with_another_batch_size_goes_on_at_the_same_window(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer, [LINE * 20])
    batches = Batches(dataset, 8, 4, seed=3)
    batches.next()
    other = Batches(dataset, 8, 2, seed=3)
    other.restore(batches.state())
    halves = np.concatenate([other.next().tokens, other.next().tokens])
    assert np.array_equal(halves, batches.next().tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "batches.jsonl: cannot continue from the checkpoint: its seed is 4, here"),
        ({"data": "other"}, "it was trained on a different text or with a different tokenizer"),
        ({"context_length": 9}, "its context_length is 9, here it is 8"),
        ({"shuffle": False}, "its shuffle is False, here it is True"),
        ({"epoch": None}, "the checkpoint holds no position in the data"),
        ({"window": 100000}, "the checkpoint's position is not in the data"),
        ({"epoch": -1}, "the checkpoint's position is not in the data"),
    ],
)
def test_resuming_on_other_data_is_refused(
    tokenizer: Tokenizer, change: dict[str, object], message: str
) -> None:
    batches = Batches(make_dataset(tokenizer, [LINE * 5]), 8, 2, seed=3)
    with pytest.raises(DataError) as error:
        batches.restore({**batches.state(), **change})
    assert message in str(error.value)


def test_the_last_token_needs_no_window_of_its_own(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer, ["1234", "56789"])
    length = dataset.n_tokens
    assert Batches(dataset, length - 1, 1, seed=0).steps_per_epoch == 1
    assert Batches(dataset, length - 2, 1, seed=0).steps_per_epoch == 2
    assert Batches(dataset, length - 2, 2, seed=0).steps_per_epoch == 1


def test_a_text_shorter_than_one_context_is_refused(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer, ["abc"])
    length = dataset.n_tokens
    assert Batches(dataset, length, 1, seed=0).steps_per_epoch == 1
    with pytest.raises(DataError) as error:
        Batches(dataset, length + 1, 1, seed=0)
    assert str(error.value) == (
        f"batches.jsonl: {length} tokens in all, fewer than one context of {length + 1}:"
        " more text or a smaller data.context_length"
    )
    assert len(list(sequential(dataset, length + 1, 1))) == 1  # evaluation pads
