"""What comes on top of a configuration file: --set, and the sizes of a base checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from tinyllama.config import (
    SECTIONS,
    Config,
    LlamaConfig,
    LoraConfig,
    QloraConfig,
    config_from_toml,
    load_config,
)
from tinyllama.config.options import options_of
from tinyllama.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text, "x.toml", overrides)
    return str(caught.value).split("\n")


def only_problem(text: str, *overrides: str) -> str:
    (problem,) = problems(text, *overrides)
    return problem


def toml(text: str = "", *overrides: str) -> Config:
    return config_from_toml(text, "x.toml", overrides)


# --- overrides ---


def test_overrides_reach_every_key() -> None:
    full = Config(lora=LoraConfig(), qlora=QloraConfig())
    for section, cls in SECTIONS.items():
        for option in options_of(section, cls):
            value = getattr(getattr(full, section), option.name)
            if value is not None:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                text = text.replace("(", "[").replace(")", "]")
                config = toml("[lora]", f"{option.key}={text}")
                assert getattr(getattr(config, section), option.name) == value, option.key
                assert option.key in config.given


def test_overrides_come_after_the_file_and_the_last_one_counts() -> None:
    config = toml(
        "[training]\nlearning_rate = 1\n",
        "training.learning_rate=1e-3",
        " training.learning_rate = 2e-3 ",
    )
    assert config.training.learning_rate == 2e-3
    assert list(config.given) == ["training.learning_rate"]


def test_an_override_puts_a_wrong_value_of_the_file_right() -> None:
    assert toml("[model]\nnum_layers = 0", "model.num_layers=2").model.num_layers == 2


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("data/a b.txt", "data/a b.txt"),
        ('"quoted"', "quoted"),
        ("2024", "2024"),
        ("2024-01-02", "2024-01-02"),
        ("true", "true"),
        ("a=b", "a=b"),
        ("a#b", "a#b"),
        ("1\nx = 2", "1\nx = 2"),
        ("['a', 'b']", ("a", "b")),
    ],
)
def test_an_override_is_toml_or_else_a_string(raw: str, value: object) -> None:
    assert toml("", f"data.train_path={raw}").data.train_path == value


def test_an_override_of_quoted_nothing_is_nothing_and_not_two_quotes() -> None:
    said = only_problem("", 'data.tokenizer=""')
    assert said == '--set data.tokenizer="": got "", must be a string that is not empty'


def test_an_override_creates_an_optional_section_and_none_removes_it() -> None:
    assert toml("", "lora.rank=4").lora == LoraConfig(rank=4)
    config = load_config(CONFIGS / "7b.toml", ["lora=none", "qlora=none"])
    assert (config.lora, config.qlora) == (None, None)
    assert not any(key.startswith("lora.") for key in config.given)
    assert toml("[lora]\nrank = 0", "lora=none", "lora.alpha=2").lora == LoraConfig(alpha=2.0)


def test_an_override_of_none_unsets_a_key_that_may_be_unset() -> None:
    config = toml(
        "[training]\nmax_steps = 5\nmicro_batch_size = 5",
        *["training.max_steps=none"] * 2,
        "training.micro_batch_size=none",
    )
    assert (config.training.max_steps, config.training.micro_batch_size) == (None, None)
    assert config.given == {}
    said = only_problem("", "training.seed=none")
    assert said.startswith('--set training.seed=none: got "none", must be an integer')


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr=1", "unknown key, the nearest is training.learning_rate"),
        ("trainin.lr=1", "unknown key, the nearest is training.learning_rate"),
        ("optim.learning_rate=1", "unknown key, the nearest is training.learning_rate"),
        ("training.lr=none", "unknown key, the nearest is training.learning_rate"),
        ("training.max_steps.x=none", "unknown key, the nearest is training.max_steps"),
        ("training", "must have the form section.key=value"),
        ("training.seed", "must have the form section.key=value"),
        ("lora=8", "must have the form section.key=value"),
        ("model=none", "must have the form section.key=value"),
        ("max_steps=3", "must have the form section.key=value, here training.max_steps"),
        (
            "qlora.bits=4",
            "[qlora] packs a base for adapters: add a [lora] section, or remove [qlora]",
        ),
        ("model.num_layers=1.5", "got 1.5, must be an integer of 1 or more"),
        ("model.num_layers=", 'got "", must be an integer of 1 or more'),
        ("training.devices=True", 'got "True", must be an integer of 1 or more'),
        ("model.hidden_size=770", "got 770, must be divisible by model.num_heads, which is 12"),
        (
            "model.num_heads=7",
            "model.hidden_size: got 768, must be divisible by model.num_heads, which is 7",
        ),
    ],
)
def test_a_wrong_override_is_named_as_it_was_written(override: str, said: str) -> None:
    assert only_problem("", override) == f"--set {override}: {said}"


# --- a base checkpoint brings its own sizes ---

BASE = LlamaConfig(
    vocab_size=500, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, max_seq_len=128
)


def test_a_base_gives_the_sizes_that_are_not_set() -> None:
    config = toml("[model]\nbase = 'dir'\nmax_seq_len = 4096\n[data]\ncontext_length = 4096")
    found = dataclasses.replace(BASE, num_kv_heads=2, rope_theta=5e5, tie_word_embeddings=True)
    resolved = config.with_base(found, "dir/config.json")
    assert resolved.model == dataclasses.replace(found, base="dir", max_seq_len=4096)
    assert resolved.data == config.data
    assert toml(resolved.to_toml()).with_base(found, "dir/config.json") == resolved


def test_sizes_that_are_set_must_be_those_of_the_base() -> None:
    config = toml("[model]\nbase = 'dir'\nhidden_size = 768\nnum_kv_heads = 2\nnum_heads = 4")
    with pytest.raises(ConfigError) as caught:
        config.with_base(BASE, "dir/config.json")
    assert str(caught.value).split("\n") == [
        "x.toml: model.hidden_size: got 768, must be 64 as in dir/config.json",
        "x.toml: model.num_kv_heads: got 2, must be 4 as in dir/config.json",
    ]
    in_python = Config(model=LlamaConfig(base="dir", num_layers=3))
    with pytest.raises(ConfigError, match=r"^model.num_layers: got 3, must be 2 as in dir$"):
        in_python.with_base(BASE, "dir")


def test_what_depends_on_the_sizes_of_a_base_is_checked_when_they_are_known() -> None:
    config = toml("[model]\nbase = 'dir'\n[data]\ncontext_length = 129")
    with pytest.raises(
        ConfigError, match=r"got 129, must be at most model.max_seq_len, which is 128"
    ):
        config.with_base(BASE, "dir")
    fits = toml("[model]\nbase = 'dir'\n[data]\ncontext_length = 128").with_base(BASE, "dir")
    assert fits.context_length == 128


def test_a_tilde_in_a_path_is_its_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = """
[model]
base = "~/base"
[data]
tokenizer = "~/t.model"
cache_dir = "~/cache"
[checkpointing]
checkpoint_dir = "~nobody-of-that-name/run"
"""
    config = toml(text, "checkpointing.checkpoint_dir=~/run")
    assert (config.model.base, config.data.tokenizer) == ("/home/me/base", "/home/me/t.model")
    assert config.data.cache_dir == "/home/me/cache"
    assert config.checkpointing.checkpoint_dir == "/home/me/run"
    assert toml(text).checkpointing.checkpoint_dir == "~nobody-of-that-name/run"
    assert toml("", "data.tokenizer=train").data.tokenizer == "train"
