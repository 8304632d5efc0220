"""The thirteen properties of every valid configuration; see the specification."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad.helpers import GlobalCounters

from tinyllama.config import (
    ALL_LINEAR,
    Config,
    LlamaConfig,
    LoraConfig,
    QloraConfig,
    TrainingConfig,
    load_config,
)
from tinyllama.errors import ConfigError
from tinyllama.model.build import build_blank
from tinyllama.model.counts import (
    Parameters,
    attention_parameters,
    feed_forward_parameters,
    layer_parameters,
    parameters,
)
from tinyllama.model.layers import named_tensors
from tinyllama.model.llama import Llama
from tinyllama.ops.rope import frequencies
from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.storage import buffer_of
from tinyllama.train.memory_estimate import (
    lasting_bytes,
    model_parameters,
)
from tinyllama.train.optimizer import AdamW

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HUNDRED = settings(max_examples=100, deadline=None)


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def models(draw):
    """h a multiple of 64 in 64..512, 1..4 layers, heads that divide h, some of them grouped."""
    hidden = 64 * draw(st.integers(1, 8))
    heads = draw(st.sampled_from([n for n in divisors(hidden) if hidden // n % 2 == 0]))
    return LlamaConfig(
        vocab_size=draw(st.integers(100, 999)),
        hidden_size=hidden,
        num_layers=draw(st.integers(1, 4)),
        num_heads=heads,
        num_kv_heads=draw(st.none() | st.sampled_from(divisors(heads))),
        intermediate_size=draw(st.integers(64, 256)),
        tie_word_embeddings=draw(st.booleans()),
        max_seq_len=32,
    )


def built(config):
    """The counts of a model that is really built."""
    return model_parameters(Config(model=config))


@HUNDRED
@given(models())
def test_01_counted_parameters_equal_the_formula(config):
    heads = 1 if config.tie_word_embeddings else 2
    h, i, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    layers = config.num_layers * (2 * h * h + 2 * h * kv + 3 * h * i)
    norms = (2 * config.num_layers + 1) * h
    assert built(config).total == heads * config.vocab_size * h + layers + norms
    assert built(config) == parameters(config)
    assert Llama(config, seed=None).count_parameters() == built(config).total


@HUNDRED
@given(models(), st.integers(2, 512))
def test_02_heads_fill_the_width_or_are_refused(config, heads):
    assert config.head_dim * config.num_heads == config.hidden_size
    if config.hidden_size % heads:
        with pytest.raises(ConfigError, match=f"must be divisible by model.num_heads.* {heads}"):
            replace(config, num_heads=heads, num_kv_heads=None)


@HUNDRED
@given(models())
def test_03_every_layer_adds_the_same(config):
    one = replace(config, num_layers=1)
    added = (config.num_layers - 1) * layer_parameters(config)
    assert built(config).total - built(one).total == added


@HUNDRED
@given(models())
def test_04_attention_is_four_squares_or_less_in_groups(config):
    h, kv = config.hidden_size, config.kv_heads * config.head_dim
    assert attention_parameters(config) == 2 * h * h + 2 * h * kv
    assert built(config).attention == config.num_layers * attention_parameters(config)
    plain = replace(config, num_kv_heads=None)
    assert built(plain).attention == config.num_layers * 4 * h * h


@HUNDRED
@given(models())
def test_05_feed_forward_is_three_h_i(config):
    assert feed_forward_parameters(config) == 3 * config.hidden_size * config.intermediate_size
    assert built(config).feed_forward == config.num_layers * feed_forward_parameters(config)


@HUNDRED
@given(models(), st.integers(1, 500))
def test_06_the_vocabulary_changes_two_tables_and_no_layer(config, more):
    config = replace(config, tie_word_embeddings=False)
    few, many = built(config), built(replace(config, vocab_size=config.vocab_size + more))
    assert many.total - few.total == 2 * config.hidden_size * more
    assert (many.attention, many.feed_forward) == (few.attention, few.feed_forward)
    assert many.norms == few.norms


@HUNDRED
@given(models(), st.integers(-1000, 0))
def test_07_an_intermediate_size_below_one_is_refused(config, wrong):
    with pytest.raises(ConfigError, match=f"intermediate_size: got {wrong}, must be an integer"):
        replace(config, intermediate_size=wrong)
    assert config.intermediate_size > 0


@HUNDRED
@given(models())
def test_08_every_head_is_as_wide(config):
    attention = Llama(config, seed=None).model.layers[-1].self_attn
    assert attention.q_proj.out_features == config.num_heads * config.head_dim
    assert attention.k_proj.out_features == config.kv_heads * config.head_dim
    assert attention.v_proj.out_features == config.kv_heads * config.head_dim
    assert attention.o_proj.in_features == config.num_heads * config.head_dim


@HUNDRED
@given(models(), st.sampled_from(["vocab_size", "num_layers", "intermediate_size", "hidden_size"]))
def test_09_a_larger_model_has_more_parameters(config, name):
    step = 64 * config.num_heads if name == "hidden_size" else 1
    larger = replace(config, **{name: getattr(config, name) + step})
    assert built(larger).total > built(config).total


@HUNDRED
@given(st.integers(2**31, 2**60), st.integers(2**31, 2**60), st.integers(1, 2**8))
def test_10_counts_are_exact_past_two_to_the_63(half, inner, vocab):
    hidden = 2 * half
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_layers=1, num_heads=1, intermediate_size=inner
    )
    exact = 2 * vocab * hidden + 4 * hidden**2 + 3 * hidden * inner + 3 * hidden
    assert exact > 2**63
    assert parameters(config).total == built(config).total == exact


@HUNDRED
@given(models(), st.floats(100, 1e7))
def test_11_rotary_frequencies_fall_from_one(config, theta):
    found = frequencies(config.head_dim, theta)
    assert found.shape == (config.head_dim // 2,)
    assert np.isfinite(found).all() and (found > 0).all()
    assert found[0] == 1
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize(
    ("name", "preset"),
    [("124m", LlamaConfig.toy_124m()), ("7b", LlamaConfig.llama2_7b())],
)
def test_12_presets_equal_their_files(name, preset):
    assert load_config(CONFIGS / f"{name}.toml").model == preset


@st.composite
def runs(draw):
    """A model trained whole, with adapters, or with adapters on a packed base."""
    model = draw(models())
    model = replace(model, intermediate_size=64 * draw(st.integers(1, 4)))
    names = st.lists(st.sampled_from(ALL_LINEAR), min_size=1, unique=True).map(tuple)
    adapters = st.builds(LoraConfig, rank=st.integers(1, 8), target_modules=names)
    lora = draw(st.none() | adapters)
    packed = draw(st.booleans()) and lora is not None
    return Config(
        model=model,
        training=TrainingConfig(batch_size=2),
        lora=lora,
        qlora=QloraConfig(block_size=32) if packed else None,
    )


@HUNDRED
@given(runs())
def test_13_the_estimate_equals_what_is_allocated(config):
    expected = lasting_bytes(config)
    before = GlobalCounters.mem_used
    model, trained, _ = build_blank(config)
    for _, tensor in named_tensors(model):
        buffer_of(tensor)
    weights = expected["weights"] + expected["scales"] + expected["adapters"]
    assert GlobalCounters.mem_used - before == weights
    optimizer = AdamW(trained, config.training)
    finish_background_writes()
    assert GlobalCounters.mem_used - before == weights + expected["optimizer_state"]
    moments = 8 * parameters(config.model, config.lora).trainable
    assert expected["optimizer_state"] == moments
    del model, optimizer


def test_parts_add_up():
    counts = Parameters(1, 2, 4, 8, 16, 32)
    assert (counts.total, counts.base, counts.trainable) == (63, 31, 32)
    assert replace(counts, adapters=0).trainable == 31
