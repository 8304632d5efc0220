"""Scaled rotary frequencies beside the formulas of their papers, written here in float64."""

import math

import numpy as np
import pytest

from tinyllama.config import LlamaConfig, RopeScaling
from tinyllama.errors import ConfigError
from tinyllama.ops.rope import scaled_frequencies, tables

D, THETA = 64, 10000.0
LOG = 0.1 * math.log(16)
PLAIN = np.array([THETA ** (-2 * i / D) for i in range(D // 2)])


def scaled(scaling, length=64):
    return scaled_frequencies(D, THETA, scaling, length)


def test_linear_divides_every_frequency():
    found, factor = scaled(RopeScaling("linear", 4.0))
    np.testing.assert_allclose(found, PLAIN / 4, rtol=1e-14)
    assert factor == 1


def test_dynamic_begins_beyond_the_length_of_the_first_training():
    scaling = RopeScaling("dynamic", 2.0, 128)
    for length in (1, 127, 128):
        np.testing.assert_allclose(scaled(scaling, length)[0], PLAIN, rtol=1e-14)
    # theta (s T / L - (s - 1))^(D / (D - 2)), of which s T / L - (s - 1) is 5 at T = 3 L
    base = THETA * 5 ** (64 / 62)
    np.testing.assert_allclose(
        scaled(scaling, 384)[0], [base ** (-2 * i / D) for i in range(D // 2)], rtol=1e-13
    )


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    """Llama 3.1: factor 8, low 1, high 4, trained on 8192; theta 500000, head 128."""
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    found, factor = scaled_frequencies(128, 500000.0, scaling, 131072)
    kinds = {"kept": 0, "divided": 0, "blended": 0}
    for i, value in enumerate(found):
        f = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected, kind = f, "kept"
        elif wavelength > 8192 / 1:
            expected, kind = f / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - smooth) * f / 8 + smooth * f, "blended"
        kinds[kind] += 1
        assert value == pytest.approx(expected, rel=1e-13), i
    assert factor == 1
    assert kinds == {"kept": 29, "divided": 29, "blended": 6}


def test_yarn_interpolates_by_how_often_a_pair_turns():
    """Section 3.2: gamma(r) is 0 below alpha turns in L, 1 above beta; in pairs, rounded outwards
    as the authors' code does. Section 3.4: attention is scaled by 0.1 ln s + 1."""
    scaling = RopeScaling("yarn", 16.0, 4096)
    found, factor = scaled(scaling)
    assert factor == pytest.approx(0.1 * math.log(16) + 1)
    # The pair with r turns: L / (2 pi theta^(2i/D)) = r.
    low = math.floor(D * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(THETA)))
    high = math.ceil(D * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(THETA)))
    assert (low, high) == (10, 23)
    for i, value in enumerate(found):
        extrapolated = 1 - min(max((i - low) / (high - low), 0), 1)
        expected = PLAIN[i] * extrapolated + PLAIN[i] / 16 * (1 - extrapolated)
        assert value == pytest.approx(expected, rel=1e-13), i


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.1 * math.log(16) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.7}, 0.1 * math.log(16) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, (0.7 * LOG + 1) / (0.5 * LOG + 1)),
    ],
)
def test_factors_of_yarn(options, factor):
    scaling = RopeScaling("yarn", 16.0, 4096, **options)
    assert scaled(scaling)[1] == pytest.approx(factor, rel=1e-14)
    plain, stretched = tables(D, THETA, 8), tables(D, THETA, 8, scaling)
    np.testing.assert_allclose(stretched[0][0], plain[0][0] * factor, rtol=1e-6)
    assert (stretched[1][0] == 0).all()


def test_yarn_without_truncation_has_its_ramp_where_the_formula_has():
    scaling = RopeScaling("yarn", 4.0, 512, beta_fast=8.0, beta_slow=2.0, truncate=False)
    low, high = (
        D * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (8, 2)
    )
    ramp = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scaled(scaling)[0], PLAIN * (1 - ramp + ramp / 4), rtol=1e-13)


def test_no_scaling_gives_the_tables_that_always_were():
    cos, sin = tables(D, THETA, 50)
    angles = np.outer(np.arange(50, dtype=np.float64), PLAIN)
    np.testing.assert_array_equal(cos, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(np.float32))


def test_the_length_of_the_first_training_is_max_seq_len_unless_it_is_stated():
    model = LlamaConfig(max_seq_len=777, rope_scaling=RopeScaling("yarn", 2.0))
    assert model.scaling.original_max_position_embeddings == 777
    stated = LlamaConfig(max_seq_len=777, rope_scaling=RopeScaling("yarn", 2.0, 99))
    assert stated.scaling.original_max_position_embeddings == 99
    assert LlamaConfig(rope_scaling=RopeScaling("default")).rope_scaling is None


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (RopeScaling("llama3", 8.0), "must be one with low_freq_factor and a larger high_freq_f"),
        (RopeScaling("llama3", 8.0, None, 4.0, 4.0), "must be one with low_freq_factor and a la"),
        (RopeScaling("linear", 8.0, None, 1.0, 4.0), "without low_freq_factor and high_freq_fac"),
        (RopeScaling("linear", 8.0, truncate=False), 'without .*, truncate, which belong to "ya'),
        (RopeScaling("yarn", 8.0, beta_fast=1.0), "one whose beta_fast is larger than beta_slow"),
        (RopeScaling("yarn", 0.5), "must be a table with rope_type"),
        (RopeScaling("yarn", math.inf), "must be a table with rope_type"),
    ],
)
def test_parameters_that_do_not_belong_to_the_type_are_refused(scaling, message):
    with pytest.raises(ConfigError, match=f"^model.rope_scaling: got .*{message}"):
        LlamaConfig(rope_scaling=scaling)
