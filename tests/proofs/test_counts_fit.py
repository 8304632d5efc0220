"""Counts of parameters, elements and bytes fit their types, for all sizes below stated limits.

Python's own integers have no limit; what leaves them are sizes of memory in NumPy's int64
(runtime/layout.py), and `long` and `int` of the C files.
"""

import inspect
from typing import Any

import pytest
import z3
from proof_source import CText, proved, python_term, quoted
from test_products import BOUNDS, c_text

from tinyllama.model import counts
from tinyllama.runtime import layout

LONG = 2**63 - 1
INT = 2**31 - 1
THREADS = 2**10
ROWS = 2**29  # of a matrix, its columns and its depth
MEMORY = 2**62  # bytes: more than a processor can address


def fit(parts: list[Any], largest: int, *given: z3.BoolRef) -> None:
    """Every sum and product on the way is between -largest and largest."""
    for part in parts:
        if isinstance(part, z3.ArithRef):
            proved(z3.And(part >= -largest, part <= largest), *given)


def test_shares_of_threads_are_computed_within_a_long() -> None:
    """`split`, for any count of elements that memory holds: `grains * core` is the largest."""
    quoted(
        CText.source("common.h"), "INLINE long split(long count, long grain, int core, int threads)"
    )
    count, core, threads, grain, grains = z3.Ints("count core threads grain grains")
    given = [0 < count, count <= 2**52, 0 < grain, grain <= 2**20]
    given += [0 <= core, core <= threads, 0 < threads, threads <= THREADS]
    text = c_text("TILE_AVX512", 1)
    text.parts.clear()
    text.term("count + grain - 1", count=count, grain=grain)
    fit(text.parts, LONG, *given)
    # grains = CEIL(count, grain) <= count; the last product is the start of a share.
    proved(grains <= count, *given, (grains - 1) * grain < count, grains >= 1)
    text.parts.clear()
    text.term("grains * core", grains=grains, core=core)
    assert len(text.parts) == 1
    fit(text.parts, LONG, *given, 0 < grains, grains <= count)
    begin = z3.Int("begin")
    proved(begin * grain <= LONG, *given, begin <= grains, (grains - 1) * grain < count, begin >= 0)


@pytest.mark.parametrize("tile", ["TILE_AVX512", "TILE_AVX2", "TILE_NEON", "TILE_AMX"])
def test_the_cost_of_a_rectangle_is_computed_within_a_long(tile: str) -> None:
    """`share` of gemm.c: `height`, `width` and their product, of any matrix with 2^29 rows and
    columns; and a share of rows or columns is an int."""
    source = CText.source("gemm.c")
    quoted(
        source, "long height = CEIL(CEIL(M, MR), r) * MR, width = CEIL(CEIL(N, NR), NT / r) * NR;"
    )
    cost = "height * width + 8 * (height * CEIL(width, BLOCK_COLS) + width)"
    quoted(source, f"long cost = {cost};")
    text = c_text(tile, 2)
    rows, parts, size, tiles = z3.Ints("rows parts size tiles")
    step = max(text.term("MR"), text.term("NR"))
    # CEIL(CEIL(M, MR), r) * MR < M + 2 MR: computed as an int first.
    given = (0 < size, size <= ROWS, 0 < parts, parts <= THREADS, tiles * step < size + step)
    ceil = (rows * parts < tiles + parts, rows >= 0, tiles > 0)
    text.parts.clear()
    text.term("tiles + parts - 1", tiles=tiles, parts=parts)
    text.term("size + step - 1", size=size, step=step)
    text.term("rows * step", rows=rows, step=step)
    fit(text.parts, INT, *given, *ceil, rows <= tiles)
    tall, wide, columns = z3.Ints("tall wide columns")
    sizes = [0 < tall, tall <= ROWS + 2 * step, 0 < wide, wide <= ROWS + 2 * step]
    text.parts.clear()
    text.term(cost, height=tall, width=wide, BLOCK_COLS=columns, CEIL=lambda a, b: a)
    fit(text.parts, LONG, *sizes, columns > 0)


@pytest.mark.parametrize("bound", range(2), ids=["vectors", "AMX"])
def test_scratch_has_fewer_bytes_than_a_long_counts(bound: int) -> None:
    """What Python computes for a product with 2^29 rows, columns and depth, for all threads."""
    m, n, k = z3.Ints("m n k")
    floats = z3.Int("floats")
    sizes = [0 < m, m <= ROWS, 0 < n, n <= ROWS, 0 < k, k <= ROWS]
    source = inspect.getsource(BOUNDS[bound].function)
    quoted(source, "block = min(1 << 20, ")
    values = python_term(BOUNDS[bound].function, m, n, k, True)
    proved(values["columns"] <= 2**21, *sizes, values["columns"] >= 0)
    rows = z3.Int("rows")
    most = 2**20 + 2**18 + 1024 + rows * 2**21
    proved(floats * 4 * THREADS <= LONG, floats <= most, 0 <= rows, rows <= ROWS + 31)


def test_the_places_of_tensors_are_int64_without_overflow() -> None:
    """`placed`: ends of tensors, and the room behind the last hole."""
    source = inspect.getsource(layout.placed)
    quoted(source, "ends = np.maximum.accumulate(starts[beside] + sizes[beside])")
    quoted(source, "room = np.append(starts[beside], np.iinfo(np.int64).max) - holes")
    start, size, hole, total = z3.Ints("start size hole total")
    given = (0 <= start, 0 <= size, start + size <= total, total <= MEMORY)
    proved(start + size <= LONG, *given)
    proved(z3.And(LONG - hole >= 0, start - hole >= -LONG), *given, 0 <= hole, hole <= total)


def test_parameters_and_their_bytes_are_counted_by_pythons_integers() -> None:
    """bytes_of(count, bits) is the least number of bytes that holds them, for any count; no number
    of counts.py is NumPy's."""
    assert "numpy" not in inspect.getsource(counts)
    count = z3.Int("count")
    for width in counts.WIDTHS:
        found = python_term(counts.bytes_of, count, width)["return"]
        proved(z3.And(8 * found >= count * width, 8 * (found - 1) < count * width), count >= 0)


def test_a_type_that_is_too_small_is_found() -> None:
    """The proofs see an overflow: of `int` where `long` is needed."""
    grains, core = z3.Ints("grains core")
    text = c_text("TILE_AVX512", 1)
    text.parts.clear()
    text.term("grains * core", grains=grains, core=core)
    given = (0 < grains, grains <= 2**26, 0 <= core, core <= THREADS)
    fit(text.parts, LONG, *given)
    with pytest.raises(AssertionError, match="not true"):
        fit(text.parts, INT, *given)
