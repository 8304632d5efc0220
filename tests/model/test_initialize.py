"""First weights: normal numbers of the right size, which depend on the seed and the name alone."""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinyllama.model.initialize import PART_ELEMENTS, first_values, quantiles


def values(name: str, shape: tuple[int, ...], seed: int = 1, threads: int = 2) -> np.ndarray:
    with ThreadPoolExecutor(threads) as pool:
        return first_values(name, shape, 8, seed, pool)


def test_the_numbers_are_normal() -> None:
    found = values("model.layers.0.mlp.up_proj.weight", (1500, 1001)).ravel()
    n = found.size
    assert found.mean() == pytest.approx(0, abs=4 * 0.02 / math.sqrt(n))
    assert found.std() == pytest.approx(0.02, rel=4 / math.sqrt(2 * n))
    assert (found**4).mean() == pytest.approx(3 * 0.02**4, rel=4 * math.sqrt(32 / 3 / n))
    for z in (-3, -1, 0, 1, 3):
        share = statistics.NormalDist().cdf(z)
        error = 4 * math.sqrt(share * (1 - share) / n)
        assert (found < 0.02 * z).mean() == pytest.approx(share, abs=error + 1 / 65536)
    neighbours = np.corrcoef(found[:-1], found[1:])[0, 1]
    assert neighbours == pytest.approx(0, abs=4 / math.sqrt(n))


def test_quantiles_rise_and_are_symmetric() -> None:
    table = quantiles()
    assert table.shape == (65536,) and (np.diff(table) > 0).all()
    assert (table == -table[::-1]).all()
    assert table[-1] == np.float32(statistics.NormalDist().inv_cdf(1 - 0.5 / 65536))


def test_what_writes_into_the_residual_stream_is_smaller_and_norms_are_one() -> None:
    plain = values("model.layers.0.self_attn.q_proj.weight", (500, 500))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        small = values(f"model.layers.0.{name}.weight", (500, 500))
        assert small.std() * math.sqrt(2 * 8) == pytest.approx(plain.std(), rel=0.01)
    assert (values("model.norm.weight", (70,)) == 1).all()


def test_seed_and_name_alone_decide_in_parts_that_differ() -> None:
    name, shape = "lm_head.weight", (3, PART_ELEMENTS - 1)
    one, two = values(name, shape, threads=1), values(name, shape, threads=3)
    assert (one == two).all()
    flat = one.ravel()
    assert (flat[:1000] != flat[PART_ELEMENTS : PART_ELEMENTS + 1000]).mean() > 0.99
    assert (one != values(name, shape, seed=2)).mean() > 0.99
    assert (one != values("model.embed_tokens.weight", shape)).mean() > 0.99
