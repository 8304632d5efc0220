"""A proof that cannot fail proves nothing: each fault here is found by the proof it concerns."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import test_attention
import test_counts_fit
import test_data_and_memory
import test_products
import z3
from proof_source import CText, proved, with_fault

from tinyllama.data import batches, corpus
from tinyllama.data import layout as rows
from tinyllama.formats import int4
from tinyllama.model import counts
from tinyllama.ops import attention, matmul
from tinyllama.ops import int4 as int4_product
from tinyllama.runtime import layout
from tinyllama.train import schedule


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


# A property does not hold, a line that a proof rests on has gone, or numbers differ. A text that a
# proof cannot read fails in other words.
FOUND = r"^not true|^not in the source|^assert (.* == |np\.False_)"
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
    "a larger scratch of attention's gradients": (
        "attention_backward.c", "(4 * SEQUENCE_FLOATS + 5", "(5 * SEQUENCE_FLOATS + 5",
        lambda: test_attention.test_scratch_is_as_large_as_the_kernel_needs("backward", 8),
    ),
    "a larger scratch of attention in AMX": (
        "attention_forward_amx.c", "(2 * TILES + 5) * PACKED", "(3 * TILES + 5) * PACKED",
        lambda: test_attention.test_scratch_of_the_amx_form_is_as_large_as_the_kernel_needs(
            "forward"
        ),
    ),
    "two parts of attention's scratch in one place": (
        "attention_backward_amx.c", "w.rows = w.dout_pairs + PACKED_FLOATS;",
        "w.rows = w.dout_pairs + 0;",
        lambda: test_attention.test_scratch_of_the_amx_form_is_as_large_as_the_kernel_needs(
            "backward"
        ),
    ),
    "a row of a packed tile that is too short": (
        "attention.h", "STRIDE ((D + 31) / 32 * 32 + 16)", "STRIDE ((D + 15) / 32 * 32)",
        lambda: test_attention.test_parts_of_a_threads_scratch_lie_one_after_another(16),
    ),
    "pairs that are left over": (
        "attention.h", "(WHOLE_PAIRS + PAIRS % NT)", "WHOLE_PAIRS",
        test_attention.test_whole_pairs_are_divided_among_threads_once,
    ),
    "a strip without its last key": (
        "attention.h", "s.high = least(t.keys, s.last + 1 - t.key);",
        "s.high = least(t.keys, s.last - t.key);",
        lambda: test_attention.test_a_strip_stays_inside_its_tile_and_holds_what_its_queries_see(
            16, 12
        ),
    ),
    "a tile of 100 queries": (
        "attention.h", "#define TILE 96", "#define TILE 100",
        lambda: test_attention.test_a_strip_stays_inside_its_tile_and_holds_what_its_queries_see(
            16, 12
        ),
    ),
    "no tile for the keys that come first": (
        "attention_forward.c", "key = starts[query] / TILE * TILE;",
        "key = (starts[query] + TILE) / TILE * TILE;",
        test_attention.test_key_tiles_of_a_query_tile_cover_what_it_sees,
    ),
    "a mask that leaves out the newest keys": (
        "attention.h", "after = most(s.first + 1 - t.key, s.low)",
        "after = most(s.first + 2 - t.key, s.low)",
        test_attention.test_the_masked_rows_are_all_that_somebody_does_not_see,
    ),
    "rectangles for one thread less": (
        "gemm.c", "if (NT % r) continue;", "if ((NT - 1) % r) continue;",
        test_products.test_each_thread_has_one_rectangle_of_the_grid,
    ),
    "a loop that leaves out columns": (
        "gemm.c", "n < r.n1; n += BLOCK_COLS", "n < r.n1; n += BLOCK_COLS + NR",
        lambda: test_products.test_steps_of_a_loop_cover_its_range_once(
            "for (int n = r.n0; n < r.n1; n += BLOCK_COLS)"
        ),
    ),
    "taller blocks of A than there is room for": (
        "tile.h", "#define MC 144", "#define MC 720", scratch,
    ),
    "deeper panels of AMX": (
        "tile.h", "#define KC 384", "#define KC 1024",
        lambda: test_products.test_scratch_is_as_large_as_the_kernel_needs("TILE_AMX", 2),
    ),
    "divided numbers twice as wide": (
        "panels.h", "#define B_SLOTS (BLOCK_PANELS", "#define B_SLOTS (2 * BLOCK_PANELS",
        test_products.test_scratch_holds_numbers_that_are_divided_into_pairs,
    ),
    "more scales of few rows": (
        "int4.h", "9L * INT4_GROUPS", "17L * INT4_GROUPS",
        lambda: test_products.test_scratch_has_room_for_few_rows_of_a_packed_weight("TILE_AVX512"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", C_FAULTS)
def test_a_fault_in_a_c_file_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, proof = C_FAULTS[fault]
    with_fault(monkeypatch, file, right, wrong)
    monkeypatch.setattr(test_attention, "HEADER", CText.source("attention.h"))
    test_products.c_text.cache_clear()
    try:
        with pytest.raises(AssertionError, match=FOUND):
            proof()
    finally:
        test_products.c_text.cache_clear()


DATA = test_data_and_memory
SCHEDULE = DATA.test_the_learning_rate_stays_between_min_lr_and_the_peak_and_meets_its_ends
PYTHON_FAULTS: dict[str, tuple[Any, str, str, str, Callable[[], Any]]] = {
    "a tensor beside which another one is not looked for": (
        layout, "placed", "(last[:n] >= first[n])", "(last[:n] > first[n])",
        DATA.test_tensors_that_live_together_never_overlap,
    ),
    "a hole that is too small": (
        layout, "placed", "room >= sizes[n]", "2 * room >= sizes[n]",
        DATA.test_tensors_that_live_together_never_overlap,
    ),
    "a group that is free but for the last moment": (
        layout, "shared", "lives[i].last + 1)\n", "lives[i].last)\n",
        DATA.test_groups_without_slices_never_hold_two_living_tensors,
    ),
    "half of what is packed": (
        counts, "bytes_of", "bits // 8", "bits // 16",
        test_counts_fit.test_parameters_and_their_bytes_are_counted_by_pythons_integers,
    ),
    "bytes rounded down": (
        counts, "bytes_of", "-(-count * bits // 8)", "count * bits // 8",
        test_counts_fit.test_parameters_and_their_bytes_are_counted_by_pythons_integers,
    ),
    "a smaller scratch of attention": (
        attention, "_scratch_floats", "tile * (-(-D // 32) * 32 + 16)", "tile * (-(-D // 32) * 32)",
        lambda: test_attention.test_scratch_is_as_large_as_the_kernel_needs("forward", 16),
    ),
    "a smaller scratch of attention in AMX": (
        attention, "_scratch_floats_amx", "-(-D // 32) * 32", "D",
        lambda: test_attention.test_scratch_of_the_amx_form_is_as_large_as_the_kernel_needs(
            "backward"
        ),
    ),
    "a smaller scratch of AMX": (
        matmul, "_scratch_floats_amx", "32 * panels", "16 * panels",
        lambda: test_products.test_scratch_is_as_large_as_the_kernel_needs("TILE_AMX", 2),
    ),
    "a smaller scratch of few rows": (
        int4_product, "_dot_floats", "8 * k + 9", "7 * k + 9",
        lambda: test_products.test_scratch_has_room_for_few_rows_of_a_packed_weight("TILE_AVX2"),
    ),
    "a warm-up that ends above the peak": (
        schedule, "learning_rate", "return peak * step / schedule.warmup_steps",
        "return peak * (step + 1) / schedule.warmup_steps", lambda: SCHEDULE("cosine"),
    ),
    "a cosine that ends at half its way": (
        schedule, "learning_rate", "math.cos(math.pi * r)", "math.cos(math.pi * r / 2)",
        DATA.test_in_floating_point_the_last_step_has_exactly_min_lr,
    ),
    "a straight line that ends early": (
        schedule, "learning_rate", "height = 1 - r", "height = 1 - 2 * r",
        lambda: SCHEDULE("linear"),
    ),
    "a way that goes on behind its end": (
        schedule, "share_done", "min(1.0, max(0.0,", "min(1.1, max(0.0,", lambda: SCHEDULE("wsd"),
    ),
    "a sort that is not stable": (
        batches, "shuffled", 'kind="stable"', 'kind="quicksort"',
        DATA.test_the_order_of_an_epoch_is_a_permutation,
    ),
    "a key in two parts": (
        batches, "shuffled", "np.uint64(high - 1)", "np.uint64(high)",
        DATA.test_every_window_is_sorted_in_one_part,
    ),
    "a window too few": (
        corpus.TokenDataset, "window_count", "context_length + stride)", "context_length)",
        DATA.test_every_token_but_the_first_is_a_target_once,
    ),
    "targets that two windows have": (
        batches, "sequential", "batch.targets[overlapping, :overlap] = -1",
        "batch.targets[overlapping, : overlap - 1] = -1",
        DATA.test_every_token_but_the_first_is_a_target_once,
    ),
    "a document that is predicted from another": (
        rows.Windows, "batch", "is_padding | begin_of[:, 1:]] = -1", "is_padding] = -1",
        DATA.test_masks_leave_out_padding_and_the_first_tokens_of_documents_and_nothing_else,
    ),
    "pieces of a document that overlap": (
        rows.Pieces, "_cut", "[document]) * longest", "[document]) * (longest - 1)",
        DATA.test_every_token_of_a_document_that_is_cut_is_a_target_once,
    ),
    "a user's words that are trained": (
        rows.Pieces, "_piece", "[~is_trained] = -1", "[~is_trained] = 0",
        DATA.test_every_token_of_a_document_that_is_cut_is_a_target_once,
    ),
    "a row that is too full": (
        rows, "_packed", "with_room >> length", "with_room >> (length - 1)",
        DATA.test_pieces_lie_in_a_row_one_after_another,
    ),
    "starts that decrease": (
        rows.Windows, "batch", "np.maximum.accumulate(np.where", "np.array(np.where",
        DATA.test_starts_do_not_decrease_along_a_row,
    ),
    "rounding towards zero": (
        int4, "_divided", "np.rint(q, out=q)", "np.trunc(q, out=q)",
        DATA.test_four_bits_are_wrong_by_half_a_scale_at_most,
    ),
    "scales up to absmax / 8": (
        int4, "_scales", "LARGEST_Q + 0.5) < absmax", "LARGEST_Q + 1) < absmax",
        DATA.test_a_scale_is_never_too_small_for_its_group,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PYTHON_FAULTS)
def test_a_fault_in_a_python_function_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is compiled with its fault, and its source has it too: proofs read sources."""
    owner, name, right, wrong, proof = PYTHON_FAULTS[fault]
    sound, getsource = getattr(owner, name), inspect.getsource
    text = getsource(sound)
    assert right in text
    broken_text = text.replace(right, wrong)
    space = dict(vars(inspect.getmodule(owner)))
    exec(compile(textwrap.dedent(broken_text), name, "exec"), space)
    broken = space[name]
    monkeypatch.setattr(
        inspect, "getsource", lambda thing: broken_text if thing is broken else getsource(thing)
    )
    monkeypatch.setattr(owner, name, broken)
    bounds = test_products.BOUNDS
    changed = tuple(b._replace(function=broken) if b.function is sound else b for b in bounds)
    monkeypatch.setattr(test_products, "BOUNDS", changed)
    with pytest.raises(AssertionError, match=FOUND):
        proof()


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
