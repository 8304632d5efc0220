"""The CPU's attention, for all sizes: each row is computed by one thread, nothing leaves scratch.

Proved from attention.h, attention_forward.c and attention_backward.c, and their forms for AMX, as
clang's preprocessor expands them, and from `_scratch_floats` and `_scratch_floats_amx` of
ops/attention.py as Python parses them.
"""

import inspect
import re
from typing import Any

import pytest
import z3
from proof_source import CText, least, most, proved, python_expression, python_term, quoted

from tinyllama.ops import attention

T, D, NT, B, KV = z3.Ints("T D NT B KV")
POSITIVE = (T > 0, D > 0, NT > 0, B > 0, KV > 0)
HEADER = CText.source("attention.h")


def c_text(width: int, *files: str) -> CText:
    """For vectors of `width` floats."""
    more = {"__AVX512F__": 1} if width == 16 else {}
    return CText(("attention.h", *files), {"VW": width, "ACT": 0, **more})


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_scratch_is_as_large_as_the_kernel_needs(which: str, width: int) -> None:
    """NT threads of SCRATCH floats, and up to 16 floats before the first cache line."""
    file = f"attention_{which}.c"
    quoted(HEADER, "((__UINTPTR_TYPE__)scratch + 63) / 64 * 64")  # at most 63 bytes are skipped
    quoted(HEADER, "return (float *)line + core * floats;")
    text = c_text(width, file)
    a, b, c = (2, 3, 1) if which == "forward" else (4, 5, 2)
    # With t tiles of keys and a stride of s floats, the kernel needs this many per thread.
    t, s = z3.Ints("t s")
    needed = text.term(f"{which.upper()}_SCRATCH_FLOATS", TILES=t, STRIDE=s)
    proved(needed == a * t * 96 * s + b * 96 * s + c * 96 * 96)
    # Python allocates the same: its tile, rows and sequence are 96, 96 s and t * 96 s.
    python = python_term(attention._scratch_floats, T, D, a, b, c, names={"device": Threads})
    source = inspect.getsource(attention._scratch_floats)
    quoted(source, "sequence = -(-T // tile) * rows")
    assert python["tile"] == 96
    proved(-((-T) / 96) == text.term("TILES", T=T), *POSITIVE)
    proved(python["rows"] == 96 * text.term("STRIDE", D=D), *POSITIVE)
    returned = (
        "device.threads() * (sequences * sequence + tiles * rows + scores * tile * tile) + 16"
    )
    quoted(source, f"return {returned}")
    parts = {"sequences": a, "tiles": b, "scores": c, "tile": 96, "device": Threads}
    total = python_expression(returned, {**parts, "rows": 96 * s, "sequence": t * (96 * s)})
    proved(total == NT * needed + 16)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_scratch_of_the_amx_form_is_as_large_as_the_kernel_needs(which: str) -> None:
    files = ("attention_amx.h", f"attention_{which}_amx.c")
    text = CText(("attention.h", *files), {"VW": 16, "ACT": 1, "TILE_AMX": 1})
    a, b, c = (2, 5, 3) if which == "forward" else (7, 8, 7)
    # Tiles of 96 rows of w numbers are packed as 48 w floats, a multiple of 16.
    t, w = z3.Ints("t w")
    assert (text.term("NR"), text.term("MR")) == (32, 32)
    proved(text.term("PACKED_FLOATS", WIDTH=w) == 48 * w, w > 0)
    packed = z3.Int("packed")
    needed = text.term(f"{which.upper()}_SCRATCH_FLOATS", TILES=t, PACKED_FLOATS=packed)
    proved(needed == a * t * packed + b * packed + c * 48 * 96)
    # Python allocates the same.
    python = python_term(attention._scratch_floats_amx, T, D, a, b, c, names={"device": Threads})
    source = inspect.getsource(attention._scratch_floats_amx)
    quoted(source, "sequence = -(-T // tile) * packed")
    assert python["tile"] == 96
    proved(python["packed"] == 48 * text.term("WIDTH", D=D), *POSITIVE)
    proved(python["halves"] == c * 48 * 96)
    returned = "device.threads() * (sequences * sequence + tiles * packed + halves) + 16"
    quoted(source, f"return {returned}")
    parts = {"sequences": a, "tiles": b, "halves": c * 48 * 96, "device": Threads}
    total = python_expression(returned, {**parts, "packed": packed, "sequence": t * packed})
    proved(total == NT * needed + 16)
    # Forward and backward place their parts one after another: the pointers' steps add up.
    steps = re.findall(r"w\.\w+ = w\.\w+ \+ (.*);", CText.source(files[1]))
    given = {"TILES": t, "PACKED_FLOATS": packed}
    total = sum(text.term(step, **given) for step in [*steps, "HALF_SCORE_FLOATS"])
    proved(total == needed)


class Threads:
    """In place of system/device.py: any number of threads."""

    @staticmethod
    def threads() -> Any:
        return NT


@pytest.mark.parametrize("width", [4, 8, 16])
def test_parts_of_a_threads_scratch_lie_one_after_another(width: int) -> None:
    """A tile of panels and a sequence fit the places that the kernel gives them."""
    text = c_text(width, "attention_forward.c")
    rows, width_floats = text.term("ROWS_FLOATS", D=D), text.term("WIDTH", D=D)
    stride = text.term("STRIDE", D=D)
    proved(z3.And(width_floats >= D, stride >= width_floats), *POSITIVE)
    # (TILE / NR, WIDTH, NR) of panels need TILE * WIDTH floats.
    proved(96 * width_floats <= rows, *POSITIVE)
    # T rows, padded to a multiple of MR, in (T, STRIDE).
    padded = text.term("(T + MR - 1) / MR * MR", T=T)
    proved(padded <= 96 * text.term("TILES", T=T), *POSITIVE)
    # The strides of a row are an odd number of cache lines.
    proved(stride % 32 == 16, *POSITIVE)


def test_whole_pairs_are_divided_among_threads_once() -> None:
    """core * W + n for n < W is one to one onto 0 .. W * NT - 1."""
    text = c_text(16)
    quoted(HEADER, "core * WHOLE_PAIRS + n")
    quoted(HEADER, "WHOLE_PAIRS * NT + n - WHOLE_PAIRS")
    whole, first, second, n, m = z3.Ints("whole first second n m")
    given = (whole >= 0, 0 <= first, first < NT, 0 <= second, second < NT)
    given += (0 <= n, n < whole, 0 <= m, m < whole)
    proved(z3.And(first == second, n == m), first * whole + n == second * whole + m, *given)
    proved(first * whole + n < whole * NT, *given)
    pair, core, rest = z3.Ints("pair core rest")  # each pair below whole * NT belongs to somebody
    euclid = (pair == core * whole + rest, 0 <= rest, rest < whole, 0 <= pair)
    proved(z3.And(core >= 0, core < NT), *euclid, pair < whole * NT, NT > 0)
    # The others are B * KV - whole * NT = B * KV % NT, numbered from whole * NT on.
    pairs, left = z3.Ints("pairs left")
    given = (pairs > 0, NT > 0, pairs == whole * NT + left, 0 <= left, left < NT)
    proved(whole * NT + left == pairs, *given)
    assert text.expanded("PAIRS_PER_THREAD") == "((((long)B * KV) / NT) + ((long)B * KV) % NT)"


def test_each_tile_of_a_shared_pair_has_one_owner() -> None:
    text = c_text(16)
    owns = text.function("attention.h", "owns")
    tile, core, other = z3.Ints("tile core other")
    text.divisions.clear()
    values = {"NT": NT}
    text_term = text.term

    def with_threads(expression: str, **given: Any) -> Any:
        return text_term(expression, **{**values, **given})

    text.term = with_threads  # type: ignore[method-assign]
    turn = z3.Int("turn")
    cores = (0 <= core, core < NT, 0 <= other, other < NT, tile >= 0)
    # turn = tile % (2 NT), by its definition, so that NT may be any number.
    euclid = (0 <= turn, turn < 2 * NT)
    quoted(HEADER, "long turn = tile % (2 * NT);")
    owner = z3.If(turn < NT, turn, 2 * NT - 1 - turn)
    quoted(HEADER, "return !shared || (turn < NT ? turn : 2 * NT - 1 - turn) == core;")
    proved(z3.And(owner >= 0, owner < NT), *cores, *euclid, NT > 0)  # one owner, and only one
    for threads in range(1, 9):  # and the text itself, for each number of threads up to 8
        values["NT"] = threads
        own = [owns(1, tile, number) for number in range(threads)]
        exactly_one = z3.PbEq([(one, 1) for one in own], 1)
        proved(exactly_one, tile >= 0)
    assert owns(0, 5, 0) and owns(0, 5, 1)


@pytest.mark.parametrize("width,group", [(4, 6), (8, 6), (16, 12), (16, 32)])
def test_a_strip_stays_inside_its_tile_and_holds_what_its_queries_see(
    width: int, group: int
) -> None:
    """The rows [low, high), rounded up to MR, lie in the tile of scores; a key that a query of the
    strip attends to is in it. starts does not decrease along a row."""
    text = c_text(width)
    if group == 32:
        text = CText(("attention.h",), {"VW": width, "ACT": 1, "TILE_AMX": 1})
    functions = {"least": least, "most": most}
    query, queries, key, keys, panel = z3.Ints("query queries key keys panel")
    first, last, low, start = z3.Ints("first last low start_of_first")
    for line in (
        "s.first = t.query + panel * NR;",
        "s.last = least(s.first + NR, t.query + t.queries) - 1;",
        "s.low = most(t.starts[s.first] - t.key, 0) / MR * MR;",
        "s.high = least(t.keys, s.last + 1 - t.key);",
        "tile t = {starts, query, least(TILE, T - query), key, 0};",
        "t.keys = least(TILE, query + t.queries - key);",
    ):
        quoted(HEADER, line)
    nr, mr = text.term("NR"), text.term("MR")
    assert (text.term("TILE"), nr, mr, 96 % nr, 96 % mr) == (96, 2 * width, group, 0, 0)
    tiles = z3.Ints("query_tile key_tile")
    given = [query == 96 * tiles[0], key == 96 * tiles[1], 0 <= key, key <= query, query < T, T > 0]
    given += [queries == text.term("least(96, T - query)", T=T, query=query, **functions)]
    asked = {"query": query, "queries": queries, "key": key}
    given += [keys == text.term("least(96, query + queries - key)", **asked, **functions)]
    given += [panel >= 0, panel * nr < queries, first == query + panel * nr]
    given += [last == least(first + nr, query + queries) - 1, 0 <= start, start <= first]
    # (start - key) rounded down to MR, as C's division of a number that is not negative.
    shift = z3.Int("shift")
    given += [shift == most(start - key, 0), low == shift / mr * mr]
    high = least(keys, last + 1 - key)
    proved(z3.And(low >= 0, low <= shift), *given)
    # Rows from low on in steps of MR, the last of which may reach past high.
    end = low + ((high - low) + mr - 1) / mr * mr
    proved(end <= 96, *given, low < high)
    # A query t of the strip sees s if starts[t] <= s <= t, and starts[first] <= starts[t].
    t, s, start_of_t = z3.Ints("t s start_of_t")
    sees = (first <= t, t <= last, start <= start_of_t, start_of_t <= s, s <= t)
    here = (key <= s, s < key + keys)
    proved(z3.And(low <= s - key, s - key < high), *given, *sees, *here)


def test_key_tiles_of_a_query_tile_cover_what_it_sees() -> None:
    """Keys from the tile of starts[query] on, to the last query."""
    source = CText.source("attention_forward.c")
    quoted(source, "key = starts[query] / TILE * TILE; key < query + rows; key += TILE")
    query, rows, start, t, s, q, r = z3.Ints("query rows start t s q r")
    begin = start / 96 * 96
    sees = (0 <= start, start <= query, query <= t, t < query + rows, start <= s, s <= t)
    # s lies in tile number q from `begin` on, which the loop reaches.
    euclid = (s - begin == 96 * q + r, 0 <= r, r < 96)
    proved(z3.And(q >= 0, begin + 96 * q < query + rows, begin <= s), *sees, *euclid)


def test_the_masked_rows_are_all_that_somebody_does_not_see() -> None:
    """Between `inside` and `after` every query of the strip sees the key, so no mask is needed."""
    quoted(
        HEADER, "least(t.starts[s.last] - t.key, s.high), after = most(s.first + 1 - t.key, s.low)"
    )
    first, last, key, low, high = z3.Ints("first last key low high")
    start_of_last, t, start_of_t, k = z3.Ints("start_of_last t start_of_t k")
    inside, after = least(start_of_last - key, high), most(first + 1 - key, low)
    given = (first <= t, t <= last, start_of_t <= start_of_last, low <= k, k < high)
    unmasked = (k >= inside, z3.Not(z3.And(k >= most(after, inside))))
    sees = z3.And(start_of_t <= key + k, key + k <= t)
    proved(z3.Implies(z3.And(*unmasked), sees), *given)
