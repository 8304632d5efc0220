"""Properties of training's plans for all inputs: memory, learning rate, order of the data, targets.

Real numbers stand for floats where a proof says so; docs/proofs.md lists every assumption.
"""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import z3
from proof_source import least, most, proved, python_expression, quoted

from tinyllama.config import LRScheduleConfig
from tinyllama.data import batches, corpus
from tinyllama.data import layout as rows
from tinyllama.formats import int4
from tinyllama.runtime import layout
from tinyllama.train import schedule

# ---- memory of a step


def test_tensors_that_live_together_never_overlap() -> None:
    """`placed` puts each tensor into a hole between those that live beside it.

    Tensors beside the new one have starts in increasing order and ends; hole i begins at the
    largest end before it (0 at first), and has room up to start i. By induction over the tensors
    placed, any number of them.
    """
    source = inspect.getsource(layout.placed)
    for line in (
        "beside = np.flatnonzero((first[:n] <= last[n]) & (last[:n] >= first[n]))",
        'beside = beside[np.argsort(starts[beside], kind="stable")]',
        "ends = np.maximum.accumulate(starts[beside] + sizes[beside])",
        "holes = np.concatenate(([0], ends))",
        "room = np.append(starts[beside], np.iinfo(np.int64).max) - holes",
        "enough = np.flatnonzero(room >= sizes[n])",
        "starts[n] = holes[enough[np.argmin(room[enough])]]",
    ):
        quoted(source, line)
    # Two lives meet exactly if neither ends before the other begins: `beside` holds all of these.
    f1, l1, f2, l2, moment = z3.Ints("f1 l1 f2 l2 moment")
    both = z3.And(f1 <= moment, moment <= l1, f2 <= moment, moment <= l2)
    proved(z3.Implies(both, z3.And(f1 <= l2, l1 >= f2)), f1 <= l1, f2 <= l2)
    # The running maximum is at least every end before it: base and step of the induction.
    ends = z3.Function("ends", z3.IntSort(), z3.IntSort())
    starts = z3.Function("starts", z3.IntSort(), z3.IntSort())
    holes = z3.Function("holes", z3.IntSort(), z3.IntSort())
    i, j, count, size = z3.Ints("i j count size")
    step = holes(i + 1) == most(holes(i), ends(i))
    proved(holes(i + 1) >= ends(i), step)
    proved(holes(i + 1) >= ends(j), step, holes(i) >= ends(j))
    # So [hole, hole + size) is behind every tensor before the hole and before every one after it.
    room = z3.If(i == count, z3.IntVal(2**63 - 1), starts(i)) - holes(i)
    given = (0 <= i, i <= count, 0 <= j, j < count, room >= size, size > 0)
    before = z3.Implies(j < i, holes(i) >= ends(j))  # by the induction
    after = z3.Implies(j >= i, starts(j) >= starts(i))  # the order of the starts
    apart = z3.Or(ends(j) <= holes(i), holes(i) + size <= starts(j))
    proved(apart, *given, before, after, z3.Implies(j < count, i <= count))
    # A hole is always found: the last one has room for any tensor that a machine can hold.
    largest = 2**62
    proved(2**63 - 1 - holes(count) >= size, holes(count) <= largest, size < largest)


def test_groups_without_slices_never_hold_two_living_tensors() -> None:
    """`shared`: a group is chosen where none of the moments of the new tensor's life is busy, and
    these become busy."""
    source = inspect.getsource(layout.shared)
    for line in (
        "span = slice(lives[i].first, lives[i].last + 1)",
        "free = np.flatnonzero(~busy[: len(groups), span].any(1))",
        "busy[group, span] = True",
    ):
        quoted(source, line)
    busy = z3.Function("busy", z3.IntSort(), z3.BoolSort())
    after = z3.Function("busy_after", z3.IntSort(), z3.BoolSort())
    f1, l1, f2, l2, moment = z3.Ints("f1 l1 f2 l2 moment")
    held = z3.ForAll([moment], z3.Implies(z3.And(f1 <= moment, moment <= l1), busy(moment)))
    free = z3.ForAll([moment], z3.Implies(z3.And(f2 <= moment, moment <= l2), z3.Not(busy(moment))))
    inside = z3.And(f2 <= moment, moment <= l2)
    marked = z3.ForAll([moment], after(moment) == z3.Or(busy(moment), inside))
    lives = (f1 <= l1, f2 <= l2, held, free)
    proved(z3.Or(l1 < f2, l2 < f1), *lives)
    # What held stays marked: the invariant of the induction.
    x = z3.Int("x")
    proved(after(x), *lives, marked, z3.Or(z3.And(f1 <= x, x <= l1), z3.And(f2 <= x, x <= l2)))


# ---- the learning rate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_the_learning_rate_stays_between_min_lr_and_the_peak_and_meets_its_ends(kind: str) -> None:
    """For all steps, over the real numbers; cos is any function with -1 <= cos <= 1, cos(0) = 1 and
    cos(pi) = -1."""
    quoted(inspect.getsource(schedule.learning_rate), "return peak * step / schedule.warmup_steps")
    step, total, warmup = z3.Ints("step total warmup")
    peak, low, height, cos = z3.Reals("peak low height cos")
    limits = (0 <= low, low <= peak, peak > 0, 1 <= step, step <= total, 0 <= warmup)
    # Warm-up: a straight line from 0, of which step 0 is never run, up to the peak.
    rising = peak * z3.ToReal(step) / z3.ToReal(warmup)
    proved(z3.And(0 < rising, rising < peak), *limits, warmup > 0, step < warmup)
    # After it: r is 0 at the end of the warm-up, 1 at the last step, and between them in between.
    begin, span = z3.Ints("begin span")
    source = inspect.getsource(schedule.share_done)
    quoted(source, "span = max(1, total_steps - begin.step)")
    quoted(source, "way = min(1.0, max(0.0, (step - begin.step) / span))")
    quoted(source, "return begin.share + (1 - begin.share) * way")
    given = (*limits, begin == most(1, warmup), span == most(1, total - begin), step >= warmup)
    way = z3.Real("way")
    exact = z3.ToReal(step - begin) / z3.ToReal(span)
    share, done = z3.Reals("share done")
    clipped = way == least(z3.RealVal(1), most(z3.RealVal(0), exact))
    reached = (clipped, 0 <= share, share <= 1, done == share + (1 - share) * way)
    proved(z3.And(0 <= way, way <= 1), *given, clipped)
    proved(way == 1, *given, clipped, step == total, total > begin)
    proved(way == 0, *given, clipped, step == begin)
    proved(z3.And(share <= done, done <= 1), 0 <= way, way <= 1, *reached[1:])
    # The rate itself.
    decay = z3.Real("decay")  # decay_fraction
    falling = least(z3.RealVal(1), (1 - done) / decay)
    heights = {"cosine": (1 + cos) / 2, "linear": 1 - done, "constant": z3.RealVal(1)}
    heights["wsd"] = falling
    lines = {"cosine": "height = (1 + math.cos(math.pi * r)) / 2", "linear": "height = 1 - r"}
    lines["wsd"] = "height = min(1.0, (1 - r) / schedule.decay_fraction)"
    for line in (
        lines.get(kind, "return peak"),
        "schedule.min_lr + (peak - schedule.min_lr) * height",
    ):
        quoted(inspect.getsource(schedule.learning_rate), line)
    bounded = (height == heights[kind], -1 <= cos, cos <= 1, 0 <= done, done <= 1)
    bounded += (0 < decay, decay <= 1)
    rate = low + (peak - low) * height
    proved(z3.And(low <= rate, rate <= peak), 0 <= low, low <= peak, *bounded)
    if kind != "constant":
        proved(rate == low, low <= peak, *bounded, done == 1, cos == -1)
        proved(rate == peak, low <= peak, *bounded, done == 0, cos == 1)


def test_in_floating_point_the_last_step_has_exactly_min_lr() -> None:
    """cos(pi) is -1 in double precision, so the last step needs no real numbers."""
    for peak, low in ((3e-4, 3e-5), (1e-3, 0.0), (0.1, 1e-7)):
        for kind in ("cosine", "linear"):
            options = LRScheduleConfig(type=kind, warmup_steps=3, min_lr=low)
            assert schedule.learning_rate(100, 100, peak, options) == low
    assert math.cos(math.pi) == -1.0


# ---- the order of the data


def test_the_order_of_an_epoch_is_a_permutation() -> None:
    """Windows are sorted in parts of the range of their keys. Each is in one part, and a stable
    sort orders pairs (key, place), a strict total order: so each window has a rank of its own, and
    n windows have the ranks 0 .. n - 1."""
    source = inspect.getsource(batches.shuffled)
    quoted(source, 'by_key = np.argsort(np.concatenate(keys), kind="stable")')
    keys = z3.Function("key", z3.IntSort(), z3.IntSort())

    def comes_before(a: Any, b: Any) -> Any:
        return z3.Or(keys(a) < keys(b), z3.And(keys(a) == keys(b), a < b))

    a, b, c = z3.Ints("a b c")
    proved(z3.Not(comes_before(a, a)))
    proved(z3.Or(a == b, comes_before(a, b), comes_before(b, a)))
    proved(z3.Implies(z3.And(comes_before(a, b), comes_before(b, c)), comes_before(a, c)))
    # The rank of a window is the number of those before it. If a comes before b, all that come
    # before a come before b, and a does too but not before itself: so its rank is smaller.
    proved(z3.Implies(comes_before(c, a), comes_before(c, b)), comes_before(a, b))
    proved(z3.And(comes_before(a, b), z3.Not(comes_before(a, a))), comes_before(a, b))


def test_every_window_is_sorted_in_one_part() -> None:
    """For any number of parts and any key: part p holds the keys from bound p to bound p + 1."""
    source = inspect.getsource(batches.shuffled)
    quoted(source, "bounds = [(part << 64) // n_parts for part in range(n_parts + 1)]")
    quoted(source, "for low, high in pairwise(bounds):")
    quoted(source, "(drawn >= np.uint64(low)) & (drawn <= np.uint64(high - 1))")
    keys, n_parts, key, p, q, bound, whole = 1 << 64, *z3.Ints("n_parts key p q bound whole")
    # A bound is at most the key just where `whole`, part times keys, is below (key + 1) n_parts.
    divided = z3.And(n_parts >= 1, bound * n_parts <= whole, whole < (bound + 1) * n_parts)
    proved(whole < (key + 1) * n_parts, divided, bound <= key)
    proved(bound <= key, divided, whole < (key + 1) * n_parts)
    # So the key is in part p where `limit` = (key + 1) n_parts is above p keys, and not p + 1 keys.
    limit = z3.Int("limit")

    def holds(part: Any) -> Any:
        return z3.And(part * keys < limit, limit <= (part + 1) * keys)

    proved(p == q, holds(p), holds(q))
    some = z3.And(limit >= 1, limit <= n_parts * keys)  # as 0 <= key < keys
    first = (limit - 1) / keys
    proved(z3.And(holds(first), first >= 0, first < n_parts), some)


# ---- every token once


def windows(tokens: Any, context: Any, stride: Any) -> Any:
    """The number of windows, by the expression in the source, for any integers."""
    source = inspect.getsource(corpus.TokenDataset.window_count)
    quoted(source, "targets = self.n_tokens - 1")
    returned = "max(min(targets, 1), -(-(targets - context_length + stride) // stride))"
    quoted(source, f"return {returned}")
    values = {"targets": tokens - 1, "context_length": context, "stride": stride}
    return values, returned


def test_every_token_but_the_first_is_a_target_once() -> None:
    """Evaluation: window w begins at w * stride and its targets are the tokens from w * stride + 1
    to w * stride + context, of which later windows leave out the first context - stride."""
    source = inspect.getsource(batches.sequential)
    quoted(source, "batch.targets[overlapping, :overlap] = -1")
    quoted(source, "overlap = context_length - (stride or context_length)")
    made = inspect.getsource(rows.Windows.batch)
    quoted(made, "begins = rows * self._stride")
    quoted(made, "made[:, :-1].copy(), made[:, 1:].copy()")
    tokens, context, stride, target = z3.Ints("tokens context stride target")
    first, second, q, r, count = z3.Ints("first second q r count")
    given = (
        tokens >= 2,
        context >= 1,
        stride >= 1,
        stride <= context,
        target >= 1,
        target < tokens,
    )
    # count = ceil((targets - context + stride) / stride), at least 1: by two products.
    needed = tokens - 1 - context + stride
    ceiling = ((count - 1) * stride < needed, needed <= count * stride)
    values, returned = windows(tokens, context, stride)
    assert python_expression(returned, {"targets": 9, "context_length": 4, "stride": 2}) == 4
    assert values["targets"] is not None

    def holds(window: Any, windows: Any) -> Any:
        skipped = z3.If(window == 0, 0, context - stride)
        begin = window * stride
        inside = z3.And(begin + 1 + skipped <= target, target <= begin + context)
        return z3.And(window >= 0, window < windows, inside)

    once = (holds(first, count), holds(second, count))
    proved(first == second, *given, *once)
    # It has a window: the first one if target <= context, or else number q + 1 by Euclid.
    proved(holds(z3.IntVal(0), z3.IntVal(1)), *given, target <= context)
    euclid = (target - 1 - context == q * stride + r, 0 <= r, r < stride)
    later = (*given, target > context, *euclid)
    proved(q >= 0, *later)
    proved(q + 1 < count, *later, *ceiling, q >= 0)
    proved(holds(q + 1, count), *later, q >= 0, q + 1 < count)


def test_masks_leave_out_padding_and_the_first_tokens_of_documents_and_nothing_else() -> None:
    """targets = -1 where there is padding and where the next token begins a document; every other
    target is the next token."""
    source = inspect.getsource(rows.Windows.batch)
    quoted(source, "is_padding = tokens < 0")
    quoted(source, "targets[is_padding | begin_of[:, 1:]] = -1")
    token, following = z3.Ints("token following")
    begins = z3.Bool("begins")  # whether a document begins with the following token
    is_padding = token < 0
    target = z3.If(z3.Or(is_padding, begins), -1, following)
    given = (following >= -1, z3.Implies(is_padding, following == -1))
    trained = z3.And(token >= 0, z3.Not(begins), following >= 0)
    proved((target >= 0) == trained, *given)


def test_every_token_of_a_document_that_is_cut_is_a_target_once() -> None:
    """Pieces: piece p of a document of `size` tokens begins at p * longest. Of a text each token
    but the first is a target in one piece, of a conversation each of the first `longest` but the
    first; masks leave out those that are not trained, and no others."""
    cut = inspect.getsource(rows.Pieces._cut)
    for line in (
        "parts = np.where(is_text, np.maximum(-(-(lengths - 1) // longest), 1), 1)",
        "begins = starts[document] + (pieces - (ends - parts)[document]) * longest",
        "left = (starts + lengths)[document] - begins",
        "goes_on = is_text[document] & (left > longest)",
        "yield begins, np.minimum(left, longest), goes_on",
    ):
        quoted(cut, line)
    piece = inspect.getsource(rows.Pieces._piece)
    for line in (
        "end = begin + length + int(self._goes_on[piece])",
        "targets[: end - begin - 1] = tokens[1:]",
        "is_trained = self._dataset.trained[begin + 1 : end] == 1",
        "targets[: end - begin - 1][~is_trained] = -1",
    ):
        quoted(piece, line)
    size, longest, target, first, second, parts = z3.Ints("size longest target first second parts")
    is_text = z3.Bool("is_text")

    def holds(p: Any) -> Any:
        left = size - p * longest
        goes_on = z3.And(is_text, left > longest)
        end = p * longest + least(left, longest) + z3.If(goes_on, 1, 0)
        return z3.And(p >= 0, p < parts, p * longest + 1 <= target, target < end)

    given = (size >= 1, longest >= 1, target >= 1, target < size, parts >= 1)
    # parts = max(ceil((size - 1) / longest), 1) of a text.
    of_text = (is_text, z3.Or(parts == 1, (parts - 1) * longest < size - 1))
    of_text += (size - 1 <= parts * longest,)
    proved(first == second, *given, holds(first), holds(second))
    q, r = z3.Ints("q r")
    euclid = (target - 1 == q * longest + r, 0 <= r, r < longest)
    proved(q >= 0, *given, *euclid)
    proved(q < parts, *given, *euclid, *of_text, q >= 0)
    proved(holds(q), *given, *euclid, is_text, q >= 0, q < parts)
    whole = (z3.Not(is_text), parts == 1)
    proved(holds(z3.IntVal(0)) == (target < longest), *given, *whole)


def test_pieces_lie_in_a_row_one_after_another() -> None:
    """A piece is put into a row with room for it, and rows begin with room for the longest."""
    source = inspect.getsource(rows._packed)
    for line in (
        "fitting = with_room >> length",
        "room = length + (fitting & -fitting).bit_length() - 1",
        "row, room, n_rows = n_rows, longest, n_rows + 1",
        "if left := room - length:",
        "rows_with[left].append(row)",
    ):
        quoted(source, line)
    quoted(inspect.getsource(rows.Pieces.batch), "at += length")
    room, length, longest, lowest, used = z3.Ints("room length longest lowest used")
    given = (1 <= length, length <= longest)  # np.minimum(left, longest)
    found = z3.Or(room == longest, z3.And(lowest >= 0, room == length + lowest))
    proved(room >= length, *given, found)
    # used tokens and room are the whole row, before and after.
    kept = (used + room == longest, room >= length)
    proved(z3.And(used + length <= longest, (used + length) + (room - length) == longest), *kept)


def test_starts_do_not_decrease_along_a_row() -> None:
    """What attention's proofs assume of `starts`: a running maximum, or each piece's place and then
    the places of padding, each its own."""
    made = inspect.getsource(rows.Windows.batch)
    quoted(made, "starts = np.maximum.accumulate(np.where(is_first, positions, 0), axis=1)")
    pieces = inspect.getsource(rows.Pieces.batch)
    quoted(pieces, "starts = np.tile(np.arange(self._context_length, dtype=np.int32)")
    quoted(pieces, "starts[number, place] = at")
    before, at, length, place = z3.Ints("before at length place")
    given = (0 <= before, before <= at, length >= 1)
    proved(z3.And(before <= at, at <= at + length), *given)  # from piece to piece
    proved(place >= at, *given, place >= at + length)  # behind the last one: padding


# ---- 4 bits


def test_four_bits_are_wrong_by_half_a_scale_at_most() -> None:
    """|w - q scale| <= scale / 2 for every float32 w that a group with this scale may hold.

    Bit for bit: `q` does not decrease with w (division, rounding and clipping are monotonic), so of
    the numbers that share a q the least and the largest have the largest error. They are found for
    every positive float16 scale (63,487 of them, subnormals included) by bisection over the bits of
    w, with the source's own arithmetic.
    """
    source = inspect.getsource(int4._divided)
    for line in ("q = groups / divisors[..., None]", "np.rint(q, out=q)", "np.clip(q, -LARGEST_Q"):
        quoted(source, line)
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    wide = scales.astype(np.float64)

    def q_of(bits: Any) -> Any:
        w = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        return np.clip(np.rint(w / wide), -int4.LARGEST_Q, int4.LARGEST_Q)

    # The largest absmax that `_scales` gives this scale: absmax <= 7.5 scale, by its own test.
    quoted(inspect.getsource(int4._scales), "np.float32(LARGEST_Q + 0.5) < absmax")
    limit = scales.astype(np.float32) * np.float32(7.5)
    top = limit.view(np.uint32).astype(np.int64)
    for q in range(int4.LARGEST_Q + 1):
        low, high = np.zeros(len(scales), np.int64), top.copy()
        while (low < high).any():  # the least bits whose q is at least this one
            middle = (low + high) // 2
            reached = q_of(middle) >= q
            low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
        for bits in (low, np.maximum(low - 1, 0)):  # the first of q, and the last of q - 1
            w = bits.astype(np.uint32).view(np.float32).astype(np.float64)
            assert (np.abs(w - q_of(bits) * wide) <= wide / 2).all()
    w = limit.astype(np.float64)
    assert (np.abs(w - q_of(top) * wide) <= wide / 2).all()


def test_a_scale_is_never_too_small_for_its_group() -> None:
    """absmax <= 7.5 scale for each absmax between two neighbouring scales, at which the choice of a
    scale changes: the largest absmax of every scale, found by bisection with the source's code."""
    scales = np.arange(1, 0x7BFF, dtype=np.uint16).view(np.float16)
    low = np.zeros(len(scales), np.int64)
    high = np.full(len(scales), np.float32(7 * 65504).view(np.uint32), np.int64)

    def scale_of(bits: Any) -> Any:
        return int4._scales(bits.astype(np.uint32).view(np.float32))

    while (low < high).any():  # the largest absmax whose scale is at most this one
        middle = (low + high + 1) // 2
        below = scale_of(middle) <= scales
        low, high = np.where(below, middle, low), np.where(below, high, middle - 1)
    absmax = low.astype(np.uint32).view(np.float32)
    chosen = scale_of(low).astype(np.float32)
    assert (absmax <= chosen * np.float32(7.5)).all()
    assert (chosen == scales.astype(np.float32)).all()  # every scale is reached
