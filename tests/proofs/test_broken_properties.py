"""A proof that cannot fail proves nothing: each fault here is found by the proof it concerns."""

from collections.abc import Callable
from typing import Any

import pytest
import test_attention
import test_data_and_memory
import test_products
import z3
from proof_source import CText, proved

from tinyllama.ops import matmul


def small_scratch(m: int, n: int, k: int, narrow: bool) -> int:
    """`_scratch_floats` with too little room for the block of A."""
    panels = -(-k // 320)
    block = min(1 << 20, (k + 4 * panels) * (n + 31))
    partial = 0
    if narrow and k > 320:
        columns = min(n + 31, (2 << 20) // min(k, 2048))
        partial = (m + 13 if k > 2048 else 256) * columns
    return -(-(block + 40000 + partial) // 1024) * 1024


def scratch() -> None:
    test_products.test_scratch_is_as_large_as_the_kernel_needs("TILE_AVX512", 1)


C_FAULTS: dict[str, tuple[str, str, str, Callable[[], Any]]] = {
    "a block of B twice as large": ("tile.h", "#define BC 1048576", "#define BC 2097152", scratch),
    "a block of A three times as large": (
        "panels.h", "BLOCK_ROWS / MR * A_PANEL", "BLOCK_ROWS / MR * 3 * A_PANEL", scratch,
    ),
    "partial sums for more rows": (
        "panels.h", "ROUND(M, MR) : BLOCK_ROWS", "ROUND(M, MR) + 64 : BLOCK_ROWS", scratch,
    ),
    "a share that rounds up": (
        "common.h", "return begin < count ? begin : count;", "return begin;",
        test_products.test_shares_of_threads_are_disjoint_and_cover_everything,
    ),
    "a tile of a shared pair with two owners": (
        "attention.h", "turn < NT ? turn : 2 * NT - 1 - turn) == core",
        "turn < NT ? turn : 2 * NT - turn) == core",
        test_attention.test_each_tile_of_a_shared_pair_has_one_owner,
    ),
    "a larger scratch of attention": (
        "attention_forward.c", "3 * ROWS_FLOATS + SCORE_FLOATS", "4 * ROWS_FLOATS + SCORE_FLOATS",
        lambda: test_attention.test_scratch_is_as_large_as_the_kernel_needs("forward", 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", C_FAULTS)
def test_a_fault_in_a_c_file_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, proof = C_FAULTS[fault]
    source = CText.source

    def changed(name: str) -> str:
        text = source(name)
        assert name != file or right in text
        return text.replace(right, wrong) if name == file else text

    monkeypatch.setattr(CText, "source", staticmethod(changed))
    monkeypatch.setattr(test_attention, "HEADER", changed("attention.h"))
    test_products.c_text.cache_clear()
    try:
        with pytest.raises(AssertionError):
            proof()
    finally:
        test_products.c_text.cache_clear()


def test_too_small_a_bound_in_python_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = test_products.BOUNDS[0]._replace(function=small_scratch, a_slots="40000")
    monkeypatch.setattr(test_products, "BOUNDS", (bound, test_products.BOUNDS[1]))
    with pytest.raises(AssertionError, match="not true"):
        scratch()
    assert matmul._scratch_floats is not small_scratch


def test_a_wrong_claim_has_a_counterexample() -> None:
    x = z3.Int("x")
    with pytest.raises(AssertionError, match="counterexample"):
        proved(x * x > x, x >= 1)
    with pytest.raises(AssertionError, match="proves nothing"):
        proved(x > 1, x > 2, x < 2)


def test_scales_rounded_down_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = test_data_and_memory.int4._scales

    def nearest_only(absmax: Any) -> Any:
        return (absmax / absmax.dtype.type(7)).astype("float16")

    assert scales is not nearest_only
    monkeypatch.setattr(test_data_and_memory.int4, "_scales", nearest_only)
    with pytest.raises(AssertionError):
        test_data_and_memory.test_a_scale_is_never_too_small_for_its_group()
