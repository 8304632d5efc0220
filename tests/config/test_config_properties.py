"""Configurations drawn by hypothesis: round trips, valid shapes, and any text at all."""

import math
from typing import Annotated, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from tinyllama.config import (
    SECTIONS,
    Config,
    DataConfig,
    LlamaConfig,
    LoraConfig,
    QloraConfig,
    TrainingConfig,
    config_from_toml,
    option_table,
)
from tinyllama.config.options import Option, markdown_rows, options_of
from tinyllama.errors import ConfigError


def toml(text: str = "", *overrides: str) -> Config:
    return config_from_toml(text, "x.toml", overrides)


# --- writing ---


def names(max_size: int = 8) -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=max_size).filter(
        lambda text: "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)
    )


def configs() -> st.SearchStrategy[Config]:
    return st.builds(
        lambda heads, kv, multiple, layers, theta, path, base, lr, micro, lora: Config(
            model=LlamaConfig(
                hidden_size=heads * kv * multiple * 2,
                num_heads=heads * kv,
                num_kv_heads=kv,
                num_layers=layers,
                rope_theta=theta,
                base=base,
            ),
            training=TrainingConfig(learning_rate=lr, batch_size=60, micro_batch_size=micro),
            data=DataConfig(train_path=path),
            lora=lora,
        ),
        heads=st.integers(1, 8),
        kv=st.integers(1, 8),
        multiple=st.integers(1, 2**70),
        layers=st.integers(1, 2**70),
        theta=st.floats(1e-300, 1e300),
        path=names() | st.lists(names(), min_size=1).map(tuple),
        base=st.none() | names(),
        lr=st.floats(1e-9, 1.0),
        micro=st.none() | st.sampled_from([1, 3, 20, 60]),
        lora=st.none()
        | st.builds(
            LoraConfig,
            rank=st.integers(1, 99),
            target_modules=st.just("all-linear")
            | st.sampled_from([("q_proj",), ("up_proj", "q_proj")]),
        ),
    )


@settings(max_examples=100, deadline=None)
@given(configs())
def test_to_toml_loads_as_the_same_configuration(config: Config) -> None:
    text = config.to_toml()
    again = toml(text)
    assert again == config
    assert again.to_toml() == text


def test_to_toml_writes_every_key_that_is_set_and_ends_its_last_line() -> None:
    text = Config(qlora=QloraConfig(quantize_base=False)).to_toml()
    assert "max_steps" not in text
    assert "[lora]" not in text
    assert "\n\n[training]\nlearning_rate = 0.0003\n" in text
    lines = "quantize_base = false\nbits = 4\nblock_size = 64\nrequantize = false\n"
    assert text.endswith(f"\n[qlora]\n{lines}")


def test_option_table_has_a_row_for_every_key_with_default_limits_and_help() -> None:
    assert option_table().endswith(" |\n")
    lines = option_table().splitlines()
    keys = [option.key for name, cls in SECTIONS.items() for option in options_of(name, cls)]
    assert [line.split("`")[1] for line in lines[2:]] == keys
    assert "| `training.max_steps` | not set | an integer of 1 or more | optimizer steps " in (
        "\n".join(lines)
    )
    assert '| `training.dtype` | `"float32"` | "float32", "bfloat16" or "float16" | ' in (
        "\n".join(lines)
    )
    assert all(line.count("|") - line.count("\\|") == 5 for line in lines)


def test_a_pipe_does_not_break_a_row_of_the_table() -> None:
    (row,) = markdown_rows([Option("a.b", "b", "x|y", Annotated[int, Meta(le=3)], "this | that")])
    assert row == '| `a.b` | `"x\\|y"` | an integer at most 3 | this \\| that |'


# --- properties over valid sizes ---


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8).map(lambda n: n * 64), st.integers(1, 64))
def test_every_head_has_the_same_even_width_or_the_sizes_are_refused(
    hidden: int, heads: int
) -> None:
    if hidden % heads == 0 and hidden // heads % 2 == 0:
        config = LlamaConfig(hidden_size=hidden, num_heads=heads)
        assert config.head_dim * config.num_heads == hidden
    else:
        with pytest.raises(ConfigError, match=f"model.hidden_size: got {hidden}, must be"):
            LlamaConfig(hidden_size=hidden, num_heads=heads)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_query_heads_share_key_value_heads_evenly_or_are_refused(heads: int, kv: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": heads * 2, "num_heads": heads, "num_kv_heads": kv}
    if heads % kv == 0:
        assert LlamaConfig(**sizes).kv_heads == kv
    else:
        with pytest.raises(
            ConfigError, match=f"must be divisible by model.num_kv_heads, which is {kv}"
        ):
            LlamaConfig(**sizes)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**70), 2**70))
def test_intermediate_size_is_positive_or_refused(size: int) -> None:
    if size > 0:
        assert LlamaConfig(intermediate_size=size).intermediate_size == size
    else:
        with pytest.raises(ConfigError, match=f"model.intermediate_size: got {size}, must be an"):
            LlamaConfig(intermediate_size=size)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=40))
def test_any_text_gives_a_configuration_or_a_configuration_error(text: str, override: str) -> None:
    assume("\0" not in text)
    for overrides in ((), (override,), (f"training.{override}",), (f"data.train_path={override}",)):
        try:
            config = toml(text, *overrides)
        except ConfigError as error:
            assert str(error)
        else:
            assert math.isfinite(config.training.learning_rate)
