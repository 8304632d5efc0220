"""Faults put into the GPU kernels' texts, each of which the emulation must find."""

import math
import re

import gpu_kernels
import pytest
from gpu_kernels import Wrong, emulate

from tinyllama.ops.gpu.gemm import Tile
from tinyllama.runtime.blocks import source

NT, NN = "NT bfloat16", "NN float16"
INT4 = "NT bfloat16, 4 bits by 64"
MINIMUM = "NN bfloat16, 8 bits by 64, minimum"
SPLIT = "TN bfloat16, split"
ACCUMULATE = "NN float32, accumulate"
# What the fault is: the case that finds it, the text, what replaces it.
PRODUCT_MUTANTS = {
    "a wait for one tile too few": (NT, "WAIT(STAGES - 2);", "WAIT(STAGES - 1);"),
    "no barrier": (NT, "BARRIER; /* the tile is there for all", "; /*"),
    "nothing committed at the end": (NT, "COMMIT(); /* also", "if ((k) < end) COMMIT(); /*"),
    "a tile copied to the place in use": (
        NT,
        "ahead = stage ? stage - 1 : STAGES - 1",
        "ahead = stage",
    ),
    "A's fragment from the wrong chunk": (NT, "k / 8 + lane / 16)", "k / 8 + lane / 8 % 2)"),
    "B's fragment from the wrong rows": (NT, "m, lane % 16, k / 8", "m + 8, lane % 16, k / 8"),
    "B's fragment not transposed": (NN, "ldmatrix_transposed(x,", "ldmatrix(x,"),
    "columns past the edge are copied": (NT, "in_row && (whole_rows", "(whole_rows"),
    "a step of the copies that misses rows": (NT, "even) + i * step * cols", "even) + i * cols"),
    "a band of the wrong height": (NT, "in_band % height", "in_band % BAND"),
    "C written past its edge": (NT, "M % BM == 0 || row < M", "1"),
    "the parts of a split on one place": (SPLIT, "c += (long)part * M * N;", ""),
    "the last step of a part left out": (
        SPLIT,
        "? begin + PART : STEPS",
        "? begin + PART - 1 : STEPS",
    ),
    "what C held is forgotten": (ACCUMULATE, "+WIDEN(OUT_TYPE, c[at])", ""),
    "3xTF32 without a product": (ACCUMULATE, "mma_tf32(d->v, a->lo, b->hi);", ""),
    "packed numbers without a sign": (INT4, "(int)((bits) << (32 - BITS)) >> (32 - BITS)", "bits"),
    "packed numbers a tile late": (
        INT4,
        "WIDEN_HELD(k + STAGES - 1, ahead)",
        "WIDEN_HELD(k + STAGES - 1, stage)",
    ),
    "the scale of another group": (INT4, "scales[at / GROUP]", "scales[at / GROUP / 2]"),
    "the minimum is left out": (MINIMUM, "* h->scale + h->minimum", "* h->scale"),
}
# The same of several products in one launch.
TOGETHER_MUTANTS = {
    "the first term alone": ("a sum of three", "term == 1 ? x##1 : x##2", "x"),
    "the steps of a term run on": ("a sum of two", "(step) - term * STEPS_OF_TERM", "(step)"),
    "results of a batch in one place": ("three of one A", "which == 1 ? x1 : x2", "x1"),
    "a part of a batch's split": ("two of one B, split", "bz % SPLIT", "bz"),
    "all results are turned": ("three turned", "if (which < TURNED)", ""),
    "positions that go on into the next row": ("three turned", "row % T", "row"),
    "a pair of another head": (
        "three turned",
        "j / (HEAD / 16) * (HEAD / 8) + j % (HEAD / 16)",
        "j / (HEAD / 16) * (HEAD / 16) + j % (HEAD / 16)",
    ),
    "gate and up from the wrong rows": ("gate and up", "% (FN / 2)) + (j) / (FN / 2)", ") + 0"),
    "blocks as wide as two": (
        "gate and up",
        "in_band / height * COLUMNS",
        "in_band / height * BN",
    ),
    "the gradient without the gate's slope": (
        "their gradients",
        "(1 + g0 * (1 - s0))",
        "(1 + g0)",
    ),
}
DOCUMENTS = "float32, D 32, documents"
GROUPED = "bfloat16, D 64, three queries per key"
ATTENTION_MUTANTS = {
    "a query does not see itself": (
        GROUPED,
        "key <= (e < 2 ? upper : lower)",
        "key < (e < 2 ? upper : lower)",
    ),
    "documents see each other": (DOCUMENTS, "&& key >= (e < 2 ? upper_start : lower_start)", ""),
    "a tile with a document's edge is not masked": (DOCUMENTS, "&& t * TILE >= newest", ""),
    "the maximum of two lanes alone": (
        GROUPED,
        "x = op(x, exchanged(x, ACROSS_ROW_2, scratch, tid));",
        "",
    ),
    "sums keep the old maximum's scale": (GROUPED, "upper_sum *= upper_shrink;", ""),
    "no barrier before a tile is overwritten": (DOCUMENTS, "BARRIER;\n      FETCH(", "FETCH("),
    "no wait for a tile": (GROUPED, "WAIT(0);", ""),
    "no barrier after the wait": (GROUPED, "WAIT(0);\n    BARRIER;", "WAIT(0);"),
    "queries of another head": (GROUPED, "const int head = kv * (H / KV)", "const int head = kv"),
    "queries of a document are left out": (DOCUMENTS, "< k0 + OWN_ROWS) count++", "< k0) count++"),
    "rows past the end are written": (GROUPED, "INSIDE(row0 + ROW(e))", "1"),
    "results in the wrong order": (DOCUMENTS, "s->v[e % 2 * 2 + e / 2]", "s->v[e]"),
    "positions turned the wrong way": (
        GROUPED,
        "GET(o[j + FD / 2], e) = second * c - first * s",
        "GET(o[j + FD / 2], e) = second * c + first * s",
    ),
    "angles of another row": (GROUPED, "CLAMPED(row) * (D / 2)", "CLAMPED(row0) * (D / 2)"),
    "a gradient without its scale": (GROUPED, "gk, k0 + row, SCALE, SCALE", "gk, k0 + row, 1, 1"),
}


def change(old: str, new: str):
    def changed(text: str) -> str:
        return text.replace(old, new)

    return changed


def some_kernel_has(old: str) -> bool:
    return any(old in source(file) for file in ("gemm.c", "attention.c", "tile.h", "metal.h"))


@pytest.mark.parametrize("fault", PRODUCT_MUTANTS)
def test_a_fault_in_a_product_is_found(fault: str) -> None:
    case, old, new = PRODUCT_MUTANTS[fault]
    assert some_kernel_has(old)
    try:
        found = gpu_kernels.run_product(emulate, "cuda", case, change=change(old, new))
    except Wrong:
        found = math.inf
    assert found > 10 * gpu_kernels.allowed_product_error(case)


@pytest.mark.parametrize("fault", TOGETHER_MUTANTS)
def test_a_fault_in_several_products_is_found(fault: str) -> None:
    case, old, new = TOGETHER_MUTANTS[fault]
    assert some_kernel_has(old)
    try:
        found = gpu_kernels.wrong_together(emulate, "cuda", case, change=change(old, new))
    except Wrong:
        found = {"all": math.inf}
    assert found != {}


@pytest.mark.parametrize("fault", ATTENTION_MUTANTS)
def test_a_fault_in_attention_is_found(fault: str) -> None:
    case, old, new = ATTENTION_MUTANTS[fault]
    assert some_kernel_has(old)
    try:
        found = gpu_kernels.wrong_attention(emulate, "cuda", case, change=change(old, new))
    except Wrong:
        found = {"all": math.inf}
    assert found != {}


METAL_MUTANTS = {
    "A's rows for its columns": (
        "AT8(cols, m + 8 * h, i, k + j)",
        "AT8(cols, m + 8 * h, j, k + i)",
    ),
    "B's second matrix is the first": (
        "EACH(f[h].m, AT8(cols, n + 8 * h, j",
        "EACH(f[h].m, AT8(cols, n, j",
    ),
    "no barrier": ("BARRIER; /* the tile is there for all", "; /*"),
    "another lane layout": ("lane / 8 % 2 * 4 + lane % 2 * 2", "lane / 8 % 2 * 2 + lane % 2 * 4"),
    "zeros past the edge are not": (
        "valid ? *(GLOBAL const uint4 *)from : uint4(0)",
        "*(GLOBAL const uint4 *)from",
    ),
}


@pytest.mark.parametrize("fault", METAL_MUTANTS)
def test_a_fault_in_the_metal_form_is_found(fault: str) -> None:
    old, new = METAL_MUTANTS[fault]
    assert some_kernel_has(old)
    found = gpu_kernels.run_product(emulate, "metal", NT, change=change(old, new))
    assert found > 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("WAIT(STAGES - 2);\n        BARRIER;", "BARRIER;"),
        ("tiles + next * STAGE", "tiles + stage * STAGE"),
    ],
    ids=["no wait", "the tile before"],
)
def test_a_fault_in_the_pipelined_loop_is_found(old: str, new: str) -> None:
    assert some_kernel_has(old)
    tile = Tile(pipelined=True)
    found = gpu_kernels.run_product(emulate, "cuda", NT, change=change(old, new), tile=tile)
    assert found > 1e-3


@pytest.mark.parametrize(
    ("swizzle", "least"),
    [("(chunk)", 3), ("((chunk) ^ (row) % SWIZZLE(chunks))", 1.5)],
    ids=["none", "of neighbouring rows"],
)
def test_another_swizzle_is_right_but_has_bank_conflicts(swizzle: str, least: float) -> None:
    def changed(text: str) -> str:
        pattern = r"#define SWIZZLED\(chunks, row, chunk\) \\\n.*\n"
        new, count = re.subn(pattern, f"#define SWIZZLED(chunks, row, chunk) {swizzle}\n", text)
        assert count == 1
        return new

    assert gpu_kernels.run_product(emulate, "cuda", NT, change=changed) <= 1e-6
    assert gpu_kernels.cycles_per_bank_read() >= least
