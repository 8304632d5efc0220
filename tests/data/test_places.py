"""Documents of a tokenized text are named by file and row."""

from pathlib import Path

import pytest
from data_helpers import load, small_tokenizer, write

from tinyllama.data.batches import Batches
from tinyllama.data.corpus import Part
from tinyllama.data.places import Place, Places


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_document_is_named_by_its_file_and_row_past_empty_rows_and_files() -> None:
    write("a.jsonl", ["one", "", "two"])
    write("b.jsonl", ["", ""])
    write("c.txt", "three")
    write("d.jsonl", ["four"])
    names = ["a.jsonl", "b.jsonl", "c.txt", "d.jsonl"]
    places = Places(names)
    found = [places.of(i) for i in (3, 0, 1, 2, 4)]
    a, c, d = Path("a.jsonl"), Path("c.txt"), Path("d.jsonl")
    assert found == [Place(d, 1), Place(a, 1), Place(a, 3), Place(c, None), None]
    assert [str(place) for place in found[:4]] == [
        "d.jsonl row 1", "a.jsonl row 1", "a.jsonl row 3", "c.txt",
    ]  # fmt: skip
    assert load(small_tokenizer(), *names).n_documents == 4


def test_a_batch_says_which_documents_it_held() -> None:
    write("a.jsonl", [f"{'x' * 40} {i}" for i in range(20)])
    data = load(small_tokenizer(), "a.jsonl")
    batches = Batches(data, 16, 2, seed=5)
    for _ in range(batches.steps_per_epoch):
        batch = batches.next()
        held = batches.documents()
        windows = batches._last
        expected = set()
        for window in windows:
            begin = window * 16
            for position in range(begin, min(begin + 16, data.n_tokens)):
                expected.add(int((data.starts <= position).sum()) - 1)
        assert set(held.tolist()) == expected
        assert len(batch.tokens) == 2


def test_places_of_a_part_are_those_of_its_rows() -> None:
    rows = [f"text number {i}" for i in range(20)]
    write("a.jsonl", rows)
    part = Part(0.4, rest=True)
    kept = [i + 1 for i, row in enumerate(rows) if part.holds(row.encode())]
    places = Places("a.jsonl", part)
    assert 0 < len(kept) < 20
    assert [places.of(i) for i in range(len(kept))] == [Place(Path("a.jsonl"), n) for n in kept]
    assert places.of(len(kept)) is None
