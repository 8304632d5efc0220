"""How the next token is drawn: temperature, top-k, top-p, and what is refused."""

import math
from collections import Counter

import numpy as np
import pytest

from tinyllama.errors import ConfigError, WeightsError
from tinyllama.generate.sampling import Sampling, sample

GREEDY = Sampling(temperature=0)
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.15, 0.3], np.float32))


def draws(sampling, count=4000, logits=LOGITS):
    random = np.random.Generator(np.random.PCG64(sampling.seed))
    found = Counter(sample(logits, sampling, random) for _ in range(count))
    return {token: times / count for token, times in sorted(found.items())}


def test_draws_follow_the_probabilities():
    assert draws(Sampling(temperature=1.0)) == pytest.approx(
        {0: 0.05, 1: 0.4, 2: 0.1, 3: 0.15, 4: 0.3}, abs=0.03
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_is_a_power_of_the_probabilities(temperature):
    powers = np.exp(LOGITS) ** (1 / temperature)
    expected = dict(enumerate((powers / powers.sum()).tolist()))
    assert draws(Sampling(temperature=temperature)) == pytest.approx(expected, abs=0.03)


def test_temperature_zero_takes_the_likeliest():
    assert draws(GREEDY, 20) == {1: 1.0}


def test_top_k_keeps_the_likeliest_in_proportion():
    found = draws(Sampling(temperature=1.0, top_k=2))
    assert found == pytest.approx({1: 4 / 7, 4: 3 / 7}, abs=0.03)
    assert set(draws(Sampling(temperature=1.0, top_k=99))) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_that_reach_it():
    assert set(draws(Sampling(temperature=1.0, top_p=0.69))) == {1, 4}
    assert set(draws(Sampling(temperature=1.0, top_p=0.71))) == {1, 3, 4}
    assert set(draws(Sampling(temperature=1.0, top_p=0.01))) == {1}
    assert set(draws(Sampling(temperature=1.0, top_p=1.0))) == {0, 1, 2, 3, 4}
    found = draws(Sampling(temperature=1.0, top_p=0.71))
    assert found == pytest.approx({1: 8 / 17, 3: 3 / 17, 4: 6 / 17}, abs=0.03)


def test_top_k_and_top_p_act_together():
    assert set(draws(Sampling(temperature=1.0, top_k=3, top_p=0.8))) == {1, 4}


def test_min_p_keeps_those_near_the_likeliest():
    assert set(draws(Sampling(temperature=1.0, min_p=0.3))) == {1, 3, 4}
    assert set(draws(Sampling(temperature=1.0, min_p=0.76))) == {1}
    assert set(draws(Sampling(temperature=1.0, min_p=1.0))) == {1}
    found = draws(Sampling(temperature=1.0, min_p=0.3))
    assert found == pytest.approx({1: 8 / 17, 3: 3 / 17, 4: 6 / 17}, abs=0.03)


def test_a_token_of_the_text_is_made_less_likely_whatever_its_sign():
    logits = np.array([3.0, 2.0, -1.0, -3.0], np.float32)
    random = np.random.default_rng(0)
    twice = Sampling(temperature=0, repetition_penalty=2.0)
    assert sample(logits, twice, random) == 0
    assert sample(logits, twice, random, [0]) == 1
    assert sample(logits, twice, random, [0, 1, 0]) == 0
    negative = np.array([-1.0, -1.5, -2.5], np.float32)
    assert sample(negative, twice, random, [0]) == 1
    assert sample(negative, twice, random, [0, 1, 99]) == 0  # 99: not in this vocabulary
    assert logits.tolist() == [3.0, 2.0, -1.0, -3.0]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("temperature", -0.1, "finite and 0 or more"),
        ("temperature", math.nan, "finite and 0 or more"),
        ("seed", -1, "0 or more"),
        ("top_k", 0, "1 or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", 1.5, "0 to 1"),
        ("repetition_penalty", 0.0, "finite and above 0"),
        ("repetition_penalty", math.inf, "finite and above 0"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(option, value, allowed):
    with pytest.raises(ConfigError, match=f"{option}: got {value}, must be {allowed}"):
        Sampling(**{option: value})


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(WeightsError, match="not finite"):
        sample(np.array([0.0, np.nan], np.float32), Sampling(), np.random.default_rng(0))


def test_the_smallest_temperature_takes_the_likeliest():
    logits = np.array([1.0, 300.0, -300.0], np.float32)
    assert sample(logits, Sampling(temperature=1e-320), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("penalty", [1e-320, 1e308])
def test_any_allowed_penalty_leaves_numbers_that_can_be_drawn_from(penalty):
    logits = np.array([3.0, -2.0, 0.0, 1.0], np.float32)
    how = Sampling(temperature=1.0, repetition_penalty=penalty)
    random = how.random()
    drawn = {sample(logits, how, random, [0, 1, 2]) for _ in range(50)}
    assert drawn == ({0} if penalty < 1 else {0, 2, 3})
