"""The learning rate by the formulas, and the steps of a run."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.config import LRScheduleConfig
from tinyllama.train.schedule import Place, learning_rate, with_warmup_steps

KINDS = ["cosine", "linear", "constant", "wsd"]


def schedule(kind, warmup, min_lr, decay=0.25):
    return LRScheduleConfig(type=kind, warmup_steps=warmup, min_lr=min_lr, decay_fraction=decay)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_straight_line_from_zero_to_the_peak(kind):
    rates = [learning_rate(step, 100, 0.8, schedule(kind, 4, 0.1)) for step in range(1, 5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)


def test_cosine_goes_from_the_peak_to_min_lr_at_the_last_step():
    cosine = schedule("cosine", 10, 0.1)
    rate = lambda step: learning_rate(step, 110, 1.1, cosine)  # noqa: E731
    assert rate(10) == pytest.approx(1.1, rel=1e-12)
    assert rate(35) == pytest.approx(0.6 + 0.5 * math.sqrt(0.5), rel=1e-12)
    assert rate(60) == pytest.approx(0.6, rel=1e-12)
    assert rate(85) == pytest.approx(0.6 - 0.5 * math.sqrt(0.5), rel=1e-12)
    assert rate(109) > 0.1
    assert rate(110) == pytest.approx(0.1, rel=1e-12)
    assert rate(200) == pytest.approx(0.1, rel=1e-12)


def test_linear_goes_from_the_peak_to_min_lr_at_the_last_step():
    linear = schedule("linear", 10, 0.1)
    found = [learning_rate(step, 110, 1.1, linear) for step in (10, 35, 60, 85, 109, 110, 200)]
    assert found == pytest.approx([1.1, 0.85, 0.6, 0.35, 0.11, 0.1, 0.1], rel=1e-12)


def test_wsd_stays_at_the_peak_and_falls_over_the_last_part_to_min_lr():
    wsd = schedule("wsd", 10, 0.1, decay=0.2)
    found = [learning_rate(step, 110, 1.1, wsd) for step in (5, 10, 60, 90, 95, 100, 105, 110, 200)]
    assert found == pytest.approx([0.55, 1.1, 1.1, 1.1, 0.85, 0.6, 0.35, 0.1, 0.1], rel=1e-12)
    whole = schedule("wsd", 10, 0.1, decay=1.0)
    linear = schedule("linear", 10, 0.1)
    for step in (1, 10, 37, 110):
        assert learning_rate(step, 110, 1.1, whole) == learning_rate(step, 110, 1.1, linear)


def test_a_warm_up_ratio_is_rounded_up_and_kept_over_a_resume():
    ratio = LRScheduleConfig(type="linear", warmup_ratio=0.03, min_lr=0.1)
    resolved = with_warmup_steps(ratio, 110)
    assert resolved == LRScheduleConfig(type="linear", warmup_steps=4, min_lr=0.1)
    assert with_warmup_steps(ratio, 220, saved=4) == resolved
    plain = LRScheduleConfig(warmup_steps=7)
    assert with_warmup_steps(plain, 110, saved=None) is plain


def test_constant_stays_at_the_peak():
    constant = schedule("constant", 3, 0.1)
    assert {learning_rate(step, 50, 0.8, constant) for step in range(3, 60)} == {0.8}


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_peak(kind):
    assert learning_rate(1, 20, 0.8, schedule(kind, 0, 0.1)) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_schedule_that_is_shorter_than_its_warm_up_only_rises(kind):
    rates = [learning_rate(step, 3, 0.8, schedule(kind, 8, 0.1)) for step in (1, 2, 3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3], rel=1e-12)


@given(
    kind=st.sampled_from(KINDS),
    decay=st.floats(1e-3, 1.0),
    total=st.integers(1, 300),
    warmup=st.integers(0, 100),
    peak=st.floats(1e-6, 1.0),
    share=st.just(0.0) | st.floats(1e-3, 1.0),
)
def test_rate_rises_to_the_peak_then_never_rises_and_stays_between(
    kind, total, warmup, peak, share, decay
):
    config = schedule(kind, warmup, peak * share, decay)
    rates = [learning_rate(step, total, peak, config) for step in range(1, total + 1)]
    tiny = 1e-12 * peak
    assert all(0 <= rate <= peak + tiny for rate in rates)
    assert all(rate > 0 for rate in rates[:-1])
    top = max(warmup, 1) - 1  # index of the first step at the peak
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    after = rates[top:]
    assert all(a >= b - tiny for a, b in itertools.pairwise(after))
    assert all(rate >= peak * share - tiny for rate in after)
    if len(after) > 1 and kind != "constant":
        assert after[-1] == pytest.approx(peak * share, abs=tiny)


def place(step, epoch, window, max_steps=None):
    """In three epochs of 43 windows, as cases/07 has them."""
    return Place(step, epoch, window, 43, 3, max_steps)


def test_steps_left_follow_from_the_windows_left():
    assert place(0, 0, 0).total_steps(4) == 33
    assert place(13, 1, 8).total_steps(4) == 33
    assert place(13, 1, 8).total_steps(8) == 13 + 5 + 6  # 35 windows, then 43
    assert place(13, 1, 8).total_steps(2) == 13 + 18 + 22
    assert place(13, 1, 8).total_steps(35) == 13 + 1 + 2
    assert place(22, 2, 0).total_steps(4) == 33
    assert place(33, 3, 0).total_steps(4) == place(33, 3, 0).total_steps(8) == 33
    assert place(60, 5, 7).total_steps(4) == 60  # fewer epochs are wanted than were trained


def test_a_limit_of_steps_is_one_of_the_whole_run():
    assert place(13, 1, 8, max_steps=20).total_steps(2) == 20
    assert place(13, 1, 8, max_steps=30).total_steps(8) == 24


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_with_another_batch_size_the_rate_goes_on_from_where_it_was_to_min_lr(kind, batch_size):
    chosen, here = schedule(kind, 4, 0.1), place(13, 1, 8)
    before = learning_rate(13, 33, 1.1, chosen)
    anchor, total = here.anchor(4, chosen, None), here.total_steps(batch_size)
    assert learning_rate(13, total, 1.1, chosen, anchor) == pytest.approx(before, rel=1e-12)
    assert learning_rate(total, total, 1.1, chosen, anchor) == pytest.approx(0.1, rel=1e-12)
    assert anchor.share == pytest.approx(9 / 29)
    half = 13 + (total - 13) / 2  # of the steps left: half of what is left of the way
    share = 1 - (1 - 9 / 29) / 2
    height = (1 + math.cos(math.pi * share)) / 2 if kind == "cosine" else 1 - share
    if kind == "wsd":
        height = 1  # a quarter of the way is left for the decay, and here it has a third
    assert learning_rate(half, total, 1.1, chosen, anchor) == pytest.approx(0.1 + height)


def test_a_second_change_of_the_batch_size_goes_on_from_the_first():
    chosen = schedule("linear", 0, 0.0)
    first = place(13, 1, 8).anchor(4, chosen, None)
    total = place(13, 1, 8).total_steps(8)
    later = place(18, 2, 0)  # all of the second epoch, five steps later
    assert later.total_steps(8) == total == 24
    second = later.anchor(8, chosen, first)
    rate = learning_rate(18, total, 1.0, chosen, first)
    assert learning_rate(18, later.total_steps(2), 1.0, chosen, second) == pytest.approx(rate)
    assert second.share == pytest.approx(first.share + (1 - first.share) * 5 / 11)


def test_a_warm_up_that_is_not_over_goes_on():
    chosen = schedule("cosine", 20, 0.1)
    assert place(13, 1, 8).anchor(4, chosen, None) is None
    assert place(20, 1, 36).anchor(4, chosen, None).share == 0
