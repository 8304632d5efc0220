"""The ten tests whose numbers show a swapped operator or an off-by-one; see the specification."""

import itertools
import math

import pytest

from tinyllama.config import Config, LlamaConfig, LoraConfig
from tinyllama.errors import ConfigError
from tinyllama.model.counts import (
    adapter_parameters,
    attention_parameters,
    bytes_of,
    feed_forward_parameters,
    layer_parameters,
    parameters,
)
from tinyllama.model.llama import Llama
from tinyllama.ops.rope import frequencies
from tinyllama.train.memory_estimate import model_parameters


def sized(vocab=1000, hidden=128, layers=3, inner=512, heads=4, **options):
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        **options,
    )


def test_01_exact_counts_of_every_part():
    found = model_parameters(Config(model=sized()))
    assert found.embedding == found.head == 128_000
    assert found.attention == 3 * 65_536
    assert found.feed_forward == 3 * 196_608
    assert found.norms == 7 * 128
    assert found.total == 2 * 128_000 + 3 * (65_536 + 196_608) + 896


@pytest.mark.parametrize(
    ("hidden", "heads", "head_dim"),
    [
        (128, 1, 128),
        (128, 2, 64),
        (128, 4, 32),
        (120, 3, 40),
        (120, 5, 24),
        (768, 12, 64),
        (4096, 32, 128),
    ],
)
def test_02_head_dim_divides_or_is_refused(hidden, heads, head_dim):
    assert sized(hidden=hidden, heads=heads).head_dim == head_dim
    for wrong in (heads - 1, heads + 1):
        if wrong == 0:
            with pytest.raises(ConfigError, match="num_heads: got 0, must be an integer of 1"):
                sized(hidden=hidden, heads=wrong)
        elif hidden % wrong:
            with pytest.raises(ConfigError, match=f"hidden_size: got {hidden}, must be divisible"):
                sized(hidden=hidden, heads=wrong)
        else:
            assert sized(hidden=hidden, heads=wrong).head_dim == hidden // wrong


def test_02_one_more_or_one_less_is_refused():
    for hidden, heads in ((128, 4), (120, 5), (768, 12), (4096, 32)):
        for wrong in (hidden - 1, hidden + 1):
            with pytest.raises(ConfigError, match=f"got {wrong}, must be divisible by"):
                sized(hidden=wrong, heads=heads)


def test_03_rotary_frequencies_of_128():
    found = frequencies(128, 10000.0)
    assert found[0] == 1
    assert 0.85 < found[1] < 0.87
    assert found[63] == pytest.approx(1.1548e-4, rel=1e-4)
    with pytest.raises(IndexError):
        found[64]


def test_04_ratios_of_the_widths():
    count = parameters(sized()).total
    sizes = [bytes_of(count, bits) for bits in (32, 16, 8, 4)]
    assert [sizes[0] / size for size in sizes] == [1, 2, 4, 8]


def test_05_attention_scales_with_the_square_of_the_width():
    single, double = (attention_parameters(sized(hidden=hidden)) for hidden in (128, 256))
    assert (single, double) == (65_536, 262_144)
    grouped = attention_parameters(sized(num_kv_heads=2))
    assert grouped == 2 * 128 * 128 + 2 * 128 * 64


def test_06_feed_forward_is_three_matrices():
    found = feed_forward_parameters(sized())
    assert found == 3 * 128 * 512 == 196_608
    assert found not in (2 * 128 * 512, 4 * 128 * 512)
    layer = Llama(sized(), seed=None).model.layers[0].mlp
    assert sum(p.weight.numel() for p in vars(layer).values()) == found


def test_07_counts_are_linear_in_the_layers():
    counts = [model_parameters(Config(model=sized(layers=n))).total for n in range(1, 6)]
    steps = {after - before for before, after in itertools.pairwise(counts)}
    assert steps == {layer_parameters(sized())} == {262_400}
    assert counts[0] - 262_400 == 2 * 128_000 + 128


def test_08_adapters_of_7b_at_rank_64():
    big = LlamaConfig.llama2_7b()
    counts = {rank: adapter_parameters(big, LoraConfig(rank=rank)) for rank in (32, 64, 128)}
    assert counts == {32: 33_554_432, 64: 67_108_864, 128: 134_217_728}


def test_09_bytes_at_every_width():
    found = {bits: bytes_of(1_000_001, bits) for bits in (32, 16, 8, 4, 2)}
    assert found == {32: 4_000_004, 16: 2_000_002, 8: 1_000_001, 4: 500_001, 2: 250_001}
    assert bytes_of(4, 2) == 1 and bytes_of(5, 2) == math.ceil(10 / 8)


@pytest.mark.parametrize("vocab", [100, 1000, 10_000, 100_000])
def test_10_layers_do_not_depend_on_the_vocabulary(vocab):
    found = model_parameters(Config(model=sized(vocab=vocab)))
    assert (found.attention, found.feed_forward, found.norms) == (196_608, 589_824, 896)
    assert found.total == 2 * 128 * vocab + 787_328
