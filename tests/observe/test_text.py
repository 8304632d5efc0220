"""Unusual text is found by its tokens alone, whatever the model has learned."""

import string

import numpy as np
import pytest
from runs_helpers import tokenizer

from tinyllama.data.layout import Batch
from tinyllama.observe.text import TextWatch

T = 64


class Text:
    """Rows of tokens as a layout has them: all are targets."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.n_rows = rows.astype(np.int32), len(rows)

    def batch(self, rows: np.ndarray, batch_size: int) -> Batch:
        found = self.rows[rows]
        assert len(found) == batch_size
        return Batch(found, found, np.zeros_like(found))


def rows_of(text: str) -> np.ndarray:
    ids = np.array(tokenizer().encode(text))
    return ids[: len(ids) // T * T].reshape(-1, T)


def usual() -> np.ndarray:
    return rows_of("".join(f"def name_{i}(value):\n    return value + {i}\n" for i in range(400)))


def noise(seed: int) -> str:
    drawn = np.random.default_rng(seed).integers(33, 126, 400)
    return "".join(map(chr, drawn))


def test_a_row_of_noise_is_found_and_no_usual_one() -> None:
    watch = TextWatch(Text(usual()), tokenizer().pieces)
    bad = rows_of(noise(0))[0]
    batch = np.stack([*usual()[:3], bad, *usual()[3:5]]).astype(np.int32)
    (odd,) = watch.odd(batch)
    assert odd.row == 3 and odd.value > watch.limit > watch.usual == odd.usual
    assert watch.odd(usual().astype(np.int32)) == []


def test_the_limit_follows_from_the_text_alone_even_where_a_row_of_it_is_damaged() -> None:
    damaged = np.concatenate([usual(), rows_of(noise(1))[:1]])
    watch = TextWatch(Text(damaged), tokenizer().pieces)
    again = TextWatch(Text(damaged), tokenizer().pieces)
    assert (watch.usual, watch.limit) == (again.usual, again.limit)
    assert [odd.row for odd in watch.odd(damaged.astype(np.int32))] == [len(damaged) - 1]


def test_nats_are_per_character_of_the_vocabulary() -> None:
    pieces = ["<0x0A>", "ab", string.ascii_letters[:8], "x"]
    rows = np.tile(np.array([0, 1, 2, 3] * 16), (40, 1))
    watch = TextWatch(Text(rows), pieces)
    # Each piece is a quarter of the text, and they have 1 + 2 + 8 + 1 characters.
    assert watch.usual == pytest.approx(4 * np.log(4) / 12)
    assert watch.limit == pytest.approx(2.9 * watch.usual)


def test_few_rows_and_few_tokens_say_nothing() -> None:
    few = TextWatch(Text(usual()[:20]), tokenizer().pieces)
    assert few.odd(rows_of(noise(0)).astype(np.int32)) == []
    watch = TextWatch(Text(usual()), tokenizer().pieces)
    short = np.full((1, T), -1, np.int32)
    short[0, :20] = rows_of(noise(0))[0, :20]
    assert watch.odd(short) == []
    assert watch.score(np.full(T, -1, np.int32)) is None
