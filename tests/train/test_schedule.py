"""The learning rate by the formulas, and the steps of a run."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.config import LRScheduleConfig
from tinyllama.train.schedule import learning_rate


def schedule(kind, warmup, min_lr):
    return LRScheduleConfig(type=kind, warmup_steps=warmup, min_lr=min_lr)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
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


def test_constant_stays_at_the_peak():
    constant = schedule("constant", 3, 0.1)
    assert {learning_rate(step, 50, 0.8, constant) for step in range(3, 60)} == {0.8}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(kind):
    assert learning_rate(1, 20, 0.8, schedule(kind, 0, 0.1)) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_schedule_that_is_shorter_than_its_warm_up_only_rises(kind):
    rates = [learning_rate(step, 3, 0.8, schedule(kind, 8, 0.1)) for step in (1, 2, 3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3], rel=1e-12)


@given(
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 100),
    peak=st.floats(1e-6, 1.0),
    share=st.just(0.0) | st.floats(1e-3, 1.0),
)
def test_rate_rises_to_the_peak_then_never_rises_and_stays_between(
    kind, total, warmup, peak, share
):
    config = schedule(kind, warmup, peak * share)
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
