"""Arrays that lie on disk, and the orders and rows that are made of them in parts."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_helpers import small_tokenizer

from tinyllama.data import batches, layout
from tinyllama.data.batches import shuffled
from tinyllama.data.corpus import TokenDataset
from tinyllama.data.layout import Pieces
from tinyllama.data.spool import Spool, give_back
from tinyllama.errors import DataError


@pytest.mark.parametrize("count", [0, 3, 1 << 18])
def test_an_array_is_what_was_added_on_disk_or_not(count: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path, "int32")
    for _ in range(2):
        spool.append(np.arange(count))
    array = spool.array()
    assert array.dtype == np.int32 and not array.flags.writeable
    assert (array == np.tile(np.arange(count), 2)).all() and len(array) == 2 * count
    assert not [*tmp_path.iterdir()]


def test_what_was_read_of_a_file_is_given_back_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * (1 << 17))
    array = np.memmap(tmp_path / "a", np.uint8, "r")

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssFile:")[2].split()[0])

    before = resident()
    total = int(array.sum())
    read = resident()
    give_back(array)
    assert read > before + 30_000 > resident() + 20_000
    assert int(array.sum()) == total == 255 * 128 << 17
    give_back(np.zeros(3))


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "gone", "int64")
    with pytest.raises(DataError, match=r"gone: cannot keep there where rows lie: No such file"):
        spool.append(np.zeros(1 << 18))


@pytest.mark.parametrize("count", [0, 1, 1000, 4097])
def test_an_order_that_is_sorted_in_parts_is_the_one_that_is_sorted_at_once(
    count: int, tmp_path: Path
) -> None:
    seed = np.random.SeedSequence([3, 1])
    expected = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    for most in (64, 1 << 20):
        assert (shuffled(count, seed, tmp_path, most) == expected).all()


def dataset_of(lengths: np.ndarray, folder: Path) -> TokenDataset:
    """Conversations of these lengths, of which every token but the first is trained."""
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum()).astype(np.uint32)
    trained = np.ones(len(tokens), np.uint8)
    trained[starts] = 0
    eos = small_tokenizer().eos_id
    return TokenDataset(folder / "set", tokens, starts, 0, 0, eos, "made", trained)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_that_are_laid_out_in_blocks_hold_every_document_once(
    pack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_PACKED_PIECES", 32)
    lengths = np.random.default_rng(5).integers(2, 40, 500)
    data = dataset_of(lengths, tmp_path)
    rows = Pieces(data, 48, pack)
    batch = rows.batch(np.arange(rows.n_rows), rows.n_rows)
    trained = batch.targets[batch.targets >= 0]
    assert sorted(trained) == sorted(np.flatnonzero(data.trained))
    assert rows.documents(np.arange(rows.n_rows)).tolist() == list(range(500))
    least = -(-lengths.sum() // 48)
    assert rows.n_rows == 500 if not pack else least <= rows.n_rows < 1.1 * least


def test_memory_does_not_grow_with_the_conversations(tmp_path: Path) -> None:
    """One piece per row and epoch, in the order of lengths: all that is computed per row."""

    def peak(count: int) -> int:
        data = dataset_of(np.full(count, 3), tmp_path)
        tracemalloc.start()
        made = batches.Batches(data, 8, 4, seed=1, pack=False)
        made.next()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak(1 << 18), peak(1 << 20)
    assert many < 1.1 * few
