"""The CPU's matrix product, for all sizes: each element is computed once, nothing leaves scratch.

Proved from gemm.c, tile.h, panels.h and common.h as clang's preprocessor expands them and from
`_scratch_floats` of ops/matmul.py as Python parses it. M, N, K and the number of threads are any
positive integers; the tile and cache blocks are those of each instruction set.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import z3
from proof_source import (
    CText,
    least,
    possible,
    proved,
    python_expression,
    python_term,
    quoted,
    values_of,
)

from tinyllama.ops import int4, matmul

TILES = {"TILE_AVX512": 16, "TILE_AVX2": 8, "TILE_NEON": 4, "TILE_GENERIC": 4, "TILE_AMX": 16}
FILES = ("tile.h", "panels.h", "gemm.c")
M, N, K = z3.Ints("M N K")
POSITIVE = (M > 0, N > 0, K > 0)


@functools.cache
def c_text(tile: str, pair: int, c_type: int = 1, layout: int = 0) -> CText:
    defines = {
        tile: 1,
        "VW": TILES[tile],
        "LAYOUT": layout,
        "COMPUTE_BF16": pair - 1,
        "C_T": c_type,
    }
    return CText(FILES, defines | {"A_T": 1, "B_T": 0, "MANY_ROWS": 1})


def divided_text() -> CText:
    """float32 numbers that AMX multiplies as bfloat16 (bf16x3.h)."""
    defines = {"TILE_AMX": 1, "BF16X3": 1, "VW": 16, "LAYOUT": 2, "COMPUTE_BF16": 0}
    return CText(FILES, defines | {"A_T": 0, "B_T": 0, "C_T": 0, "MANY_ROWS": 1})


def forms() -> Iterator[tuple[str, int]]:
    """Instruction sets, and 1 or 2 numbers per slot; AMX multiplies pairs only."""
    for tile in TILES:
        yield from [(tile, 2)] if tile == "TILE_AMX" else [(tile, 1), (tile, 2)]


def split() -> Any:
    return c_text("TILE_AVX512", 1).function("common.h", "split")


# ---- each element once


def test_shares_of_threads_are_disjoint_and_cover_everything() -> None:
    """split(c) <= split(c + 1), split(0) = 0, split(threads) = count: so [split(c), split(c + 1))
    for c = 0 .. threads - 1 holds each of `count` items once, whatever the grain."""
    count, core, threads, grain, grains, now, then = z3.Ints("count core threads grain G now then")
    given = (count > 0, threads > 0, 0 <= core, core < threads, grain > 0)
    share = split()
    # The first and the last share, by the text itself.
    proved(share(count, grain, 0, threads) == 0, *given)
    # begin(core) = floor(G * core / threads) * grain: the floor by its definition.
    floors = (now * threads <= grains * core, grains * core < (now + 1) * threads)
    floors += (then * threads <= grains * (core + 1), grains * (core + 1) < (then + 1) * threads)
    proved(now <= then, *given, grains > 0, *floors)
    proved(then == grains, *given, grains > 0, core + 1 == threads, *floors)
    quoted(CText.source("common.h"), "grains * core / threads * grain")
    quoted(CText.source("common.h"), "return begin < count ? begin : count;")
    clipped = [z3.If(b * grain < count, b * grain, count) for b in (now, then)]
    proved(clipped[0] <= clipped[1], now <= then, *given)
    proved(clipped[1] == count, then * grain >= count, *given)


@pytest.mark.parametrize("grain", [16, 12, 32, 8, 6])
def test_grains_cover_the_count_and_shares_begin_at_whole_grains(grain: int) -> None:
    count, core, threads = z3.Ints("count core threads")
    given = (count > 0, threads > 0, 0 <= core, core <= threads)
    grains = c_text("TILE_AVX512", 1).term("(count + grain - 1) / grain", count=count, grain=grain)
    proved(z3.And(grains * grain >= count, (grains - 1) * grain < count), *given)
    begin = z3.Int("begin")
    proved(z3.Implies(begin * grain < count, begin < grains), begin >= 0, *given)


def test_each_thread_has_one_rectangle_of_the_grid() -> None:
    """core_id -> (row, column) is one to one onto rows x columns, where rows divides NT."""
    text = CText.source("gemm.c")
    for line in ("if (NT % r) continue;", "int columns = NT / rows, row = core_id / columns,"):
        quoted(text, line)
    rows, columns, core, row, column = z3.Ints("rows columns core row column")
    given = (rows > 0, columns > 0, 0 <= column, column < columns, 0 <= row, row < rows)
    core = row * columns + column
    proved(z3.And(core >= 0, core < rows * columns), *given)
    other_row, other_column = z3.Ints("other_row other_column")
    others = (0 <= other_column, other_column < columns, 0 <= other_row, other_row < rows)
    same = core == other_row * columns + other_column
    proved(z3.And(row == other_row, column == other_column), *given, *others, same)


@pytest.mark.parametrize("loop", [
    "for (int n = r.n0; n < r.n1; n += BLOCK_COLS)",
    "for (int k = 0; k < SLOTS; k += BLOCK_PANELS * DEPTH)",
    "for (int m0 = r.m0; m0 < r.m1; m0 += height)",
    "for (int k = k0; k < k1; k += DEPTH)",
    "for (int n = n0; n < n1; n += NR)",
])  # fmt: skip
def test_steps_of_a_loop_cover_its_range_once(loop: str) -> None:
    """A loop over [begin, end) in steps, each clipped at the end: an element lies in exactly one
    step, as steps are positive (proved below for each macro)."""
    quoted(CText.source("gemm.c"), loop)
    begin, end, step, element, first, second = z3.Ints("begin end step element first second")
    given = (step > 0, begin <= element, element < end)

    def holds(number: Any) -> Any:  # step `number` exists and holds the element
        low = begin + number * step
        high = z3.If(low + step < end, low + step, end)
        return z3.And(number >= 0, low < end, low <= element, element < high)

    # One exists: by Euclid element - begin = q * step + r.
    q, r = z3.Ints("q r")
    euclid = (element - begin == q * step + r, 0 <= r, r < step)
    proved(q >= 0, *given, *euclid)
    proved(holds(q), *given, *euclid, q >= 0)
    proved(first == second, *given, holds(first), holds(second))


# ---- inside scratch


def blocks(text: CText, pair: int) -> Iterator[tuple[int, int, list[Any]]]:
    """Every (DEPTH, BLOCK_PANELS) that some K has, with what holds for K then.

    DEPTH is ROUND(CEIL(SLOTS, panels), TILE_K) with panels = CEIL(SLOTS, KC), at most KC. The
    quotient by `panels` is described by two products, which are linear for a given DEPTH.
    """
    kc, step = text.term("KC"), text.term("TILE_K")
    quoted(CText.source("panels.h"), "#define DEPTH ROUND(CEIL(SLOTS, CEIL(SLOTS, KC)), TILE_K)")
    slots, panels = z3.Ints("slots panels")
    always = [slots == text.term("SLOTS", K=K), panels == text.term("CEIL(s, KC)", s=slots)]
    for depth in range(step, kc + 1, step):
        given = [*POSITIVE, *always, slots <= panels * depth, panels * (depth - step) < slots]
        count = text.term("BLOCK_PANELS", SLOTS=slots, DEPTH=depth)
        for value in values_of(count, *given):
            yield depth, value, [*given, count == value]


def test_the_depth_of_a_panel_is_at_most_its_place() -> None:
    """The description of DEPTH that `blocks` uses follows from its definition, and DEPTH <= KC."""
    for text in (c_text("TILE_AVX512", 2), c_text("TILE_AMX", 2), divided_text()):
        # the only three pairs of KC and TILE_K
        kc, step = text.term("KC"), text.term("TILE_K")
        slots, panels, exact, rounded = z3.Ints("slots panels exact rounded")
        given = [slots > 0, panels == text.term("CEIL(slots, KC)", slots=slots)]
        given += [panels * (exact - 1) < slots, slots <= panels * exact]  # exact = CEIL(slots, p)
        given += [rounded == text.term("ROUND(exact, TILE_K)", exact=exact)]
        proved(panels >= 1, *given)
        proved(exact <= kc, *given, panels * kc >= slots)
        proved(rounded <= kc, exact <= kc, kc % step == 0, *given[4:])
        proved(z3.And(exact <= rounded, rounded < exact + step), *given[4:])
        proved(z3.And(slots <= panels * rounded), *given[:4], exact <= rounded, panels >= 1)
        proved(panels * (rounded - step) < slots, *given[:4], rounded < exact + step, panels >= 1)


def test_products_and_quotients_keep_an_order() -> None:
    """The two steps that are not linear: a <= b and c <= d give a c <= b d, and x <= u gives
    floor(A / x) >= floor(A / u)."""
    a, b, c, d = z3.Ints("a b c d")
    proved(a * c <= b * d, 0 <= a, a <= b, 0 <= c, c <= d)
    x, u, A, by_x, by_u = z3.Ints("x u A by_x by_u")
    floors = (by_x * x <= A, A < (by_x + 1) * x, by_u * u <= A, A < (by_u + 1) * u)
    proved(by_u <= by_x, 0 < x, x <= u, 0 <= A, 0 <= by_x, 0 <= by_u, *floors)


@pytest.mark.parametrize("bound", range(2), ids=["vectors", "AMX"])
def test_what_python_allocates_is_the_sum_of_its_parts(bound: int) -> None:
    """block + room of A + partial, rounded up to 1,024 floats; block is the smaller of two."""
    python = BOUNDS[bound]
    source = inspect.getsource(python.function)
    quoted(source, f"block = min({python.block}, ({python.depth}) * ({python.width}))")
    quoted(source, f"columns = min({python.width}, ")
    quoted(source, f"return -(-(block + {python.a_slots} + partial) // 1024) * 1024")
    block, partial, room = z3.Ints("block partial room")
    total = python_expression("-(-(block + room + partial) // 1024) * 1024", locals())
    proved(total >= block + room + partial)


@pytest.mark.parametrize("tile,pair", [*forms()])
def test_scratch_is_as_large_as_the_kernel_needs(tile: str, pair: int) -> None:
    """B_SLOTS + A_SLOTS + PARTIAL_FLOATS <= the SCRATCH_FLOATS that Python computes.

    Of a 16-bit C, since a float32 C has no partial sums and else needs the same.
    """
    assert c_text(tile, pair, 0).expanded("PARTIAL").startswith("(0 != 0 && ")
    python = BOUNDS[tile == "TILE_AMX"]
    text, in_columns = c_text(tile, pair), c_text(tile, pair, 1, 2)
    for depth, count, given in blocks(text, pair):
        _prove_scratch(text, python, depth, count, given)
        a_slots = in_columns.term("A_SLOTS", M=M, DEPTH=depth, BLOCK_PANELS=count)
        proved(a_slots <= python_expression(python.a_slots, {}), M > 0)


def test_scratch_holds_numbers_that_are_divided_into_pairs() -> None:
    """bfloat16x3: slots are floats, for which Python allocates as for twice as many bfloat16."""
    text = divided_text()
    source = inspect.getsource(matmul.gemm_macros)
    quoted(source, "scratch = _scratch_floats_amx(m, n, 2 * k, narrow=False)")
    assert text.expanded("PARTIAL").startswith("(0 != 0 && ")
    for depth, count, known in blocks(text, 1):
        _prove_scratch(text, BOUNDS[1], depth, count, known, K_given=2 * K)


@pytest.mark.parametrize("tile", ["TILE_AVX512", "TILE_AVX2", "TILE_NEON"])
def test_scratch_has_room_for_few_rows_of_a_packed_weight(tile: str) -> None:
    """DOT_FLOATS of int4.h <= `_dot_floats`, which SCRATCH_FLOATS is not less than."""
    source = inspect.getsource(int4._product_cpu)
    quoted(source, 'max(sizes["SCRATCH_FLOATS"], _dot_floats(k, defines["BLOCK"]))')
    defines = {tile: 1, "VW": TILES[tile], "LAYOUT": 0, "COMPUTE_BF16": 0, "C_T": 0}
    text = CText(("tile.h", "int4.h", "panels.h"), {**defines, "A_T": 0, "B_T": 0})
    groups, block = z3.Ints("groups block")
    theirs = python_term(int4._dot_floats, K, block)["return"]
    needed = text.term("DOT_FLOATS", K=K, INT4_GROUPS=groups)
    # Groups of a row, rounded up to whole vectors.
    of_row = text.term("INT4_GROUPS", K=K, BLOCK=block)
    proved(of_row <= K / block + 15, K > 0, block > 0)
    proved(needed <= theirs, K > 0, block > 0, groups <= K / block + 15)


class Bound(NamedTuple):
    """How Python bounds scratch: its function, and expressions that stand in it."""

    function: Any
    block: str  # of which scratch needs the smaller
    depth: str
    width: str
    a_slots: str
    rows: str
    divided: tuple[str, str]


BOUNDS = (
    Bound(
        matmul._scratch_floats, "1 << 20", "k + 4 * panels", "n + 31", "131072",
        "m + 13 if k > 2048 else 256", ("2 << 20", "min(k, 2048)"),
    ),
    Bound(
        matmul._scratch_floats_amx, "1 << 20", "slots + 32 * panels", "n + 31", "512 * 384",
        "m + 31 if slots > 2048 else min(m + 31, 512)", ("1 << 20", "min(slots, 2048)"),
    ),
)  # fmt: skip


def _prove_scratch(
    text: CText, python: Bound, depth: int, count: int, given: list[Any], K_given: Any = K
) -> None:
    theirs = python_term(python.function, M, N, K_given, True)
    columns = z3.Int("columns")
    block = {"DEPTH": depth, "BLOCK_PANELS": count}
    given = [*given, columns == text.term("BLOCK_COLS", N=N, **block)]
    needed = text.term("B_SLOTS", BLOCK_COLS=columns, **block)
    their_depth, their_width, their_block, room, their_rows = (
        python_expression(quoted(inspect.getsource(python.function), expression), theirs)
        for expression in (python.depth, python.width, python.block, python.a_slots, python.rows)
    )
    # The block of B: needed = (depth * count) * columns. The block of A.
    of_b = (columns > 0, needed <= their_block)
    parts = (depth * count <= their_depth, columns <= their_width)
    proved(z3.And(*of_b, *parts, text.term("A_SLOTS", M=M, **block) <= room), *given)
    # Sums of several panels, where a 16-bit C needs them: rows * columns.
    used = text.term("SLOTS > DEPTH", K=K, DEPTH=depth)
    if K_given is K and possible(*given, used):
        proved(theirs["partial"] == their_rows * theirs["columns"], *given, used)
        proved(text.term("PARTIAL_ROWS", M=M, K=K, **block) <= their_rows, *given, used)
        per_slot = 1 if "slots" in python.divided[1] else text.term("PAIR")
        dividend, divisor = (python_expression(part, theirs) for part in python.divided)
        most = 2048 if possible(*given, divisor == 2048) else depth * count * per_slot
        proved(divisor <= most, *given, used)
        # The quotient is at least dividend // most, as shown above.
        proved(columns <= least(their_width, dividend // most), *given, used)
