"""Configuration: the files, the presets, the defaults, and values that stand for others."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyllama.config import (
    SECTIONS,
    CheckpointingConfig,
    Config,
    LlamaConfig,
    LoraConfig,
    LRScheduleConfig,
    QloraConfig,
    TrainingConfig,
    config_from_toml,
    defaults_notice,
    load_config,
    option_help,
)
from tinyllama.config.options import convert, options_of
from tinyllama.config.rope_scaling import RopeScaling
from tinyllama.errors import ConfigError, TinyllamaError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def toml(text: str = "", *overrides: str) -> Config:
    return config_from_toml(text, "x.toml", overrides)


# --- the files and the presets ---


def test_124m_file_holds_the_specified_values() -> None:
    config = load_config(CONFIGS / "124m.toml")
    assert config.model == LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        max_seq_len=2048,
        rope_theta=10000.0,
    )
    assert config.training == TrainingConfig(
        learning_rate=3e-4,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        grad_clip=1.0,
        batch_size=32,
        num_epochs=10,
    )
    assert config.lr_schedule == LRScheduleConfig(type="cosine", warmup_steps=1000, min_lr=3e-5)
    assert config.data.context_length == 2048
    assert config.checkpointing == CheckpointingConfig(
        save_every=1000, checkpoint_dir="checkpoints/124m", keep_last_n=3
    )
    assert (config.lora, config.qlora) == (None, None)


def test_7b_file_holds_the_specified_values() -> None:
    config = load_config(CONFIGS / "7b.toml")
    assert config.model == LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        intermediate_size=11008,
        max_seq_len=4096,
        rope_theta=10000.0,
    )
    training = config.training
    assert (training.learning_rate, training.batch_size, training.num_epochs) == (1e-4, 4, 3)
    assert (config.lr_schedule.warmup_steps, config.lr_schedule.min_lr) == (2000, 1e-5)
    assert config.data.context_length == 4096
    assert (config.checkpointing.save_every, config.checkpointing.keep_last_n) == (500, 2)
    assert config.lora == LoraConfig(
        rank=64,
        alpha=128.0,
        dropout=0.0,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    )
    assert config.qlora == QloraConfig(quantize_base=True, bits=4, block_size=64)


def test_presets_equal_their_files() -> None:
    assert LlamaConfig.toy_124m() == load_config(CONFIGS / "124m.toml").model
    assert LlamaConfig.llama2_7b() == load_config(CONFIGS / "7b.toml").model


def test_an_empty_file_is_a_complete_configuration_of_valid_defaults() -> None:
    assert toml() == Config()
    for section, cls in SECTIONS.items():
        for option in options_of(section, cls):
            assert convert(option.default, option.hint) == option.default, option.key


def test_defaults_are_those_a_person_would_choose() -> None:
    full = Config(lora=LoraConfig(), qlora=QloraConfig())
    sections = {name: dataclasses.asdict(getattr(full, name)) for name in SECTIONS}
    del sections["model"]  # the sizes of the 124m preset, tested with its file
    assert sections == {
        "training": {
            "learning_rate": 3e-4,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "grad_clip": 1.0,
            "batch_size": 32,
            "micro_batch_size": None,
            "num_epochs": 1,
            "max_steps": None,
            "seed": 0,
            "dtype": "float32",
            "float32_products": "exact",
            "eval_every": None,
            "eval_first": False,
            "checkpoint_activations": False,
            "objective": "sft",
            "label_smoothing": 0.0,
            "z_loss": 0.0,
            "neftune_alpha": 0.0,
            "early_stopping": None,
            "optimizer_state": "float32",
            "devices": 1,
            "beam": 0,
        },
        "lr_schedule": {
            "type": "cosine",
            "warmup_steps": 0,
            "warmup_ratio": 0.0,
            "decay_fraction": 0.2,
            "min_lr": 0.0,
        },
        "data": {
            "train_path": "data/train.txt",
            "val_path": None,
            "context_length": None,
            "tokenizer": None,
            "tokenizer_vocab_size": None,
            "special_tokens": True,
            "replace_tokenizer": False,
            "train_on": None,
            "template": None,
            "pack": True,
            "val_fraction": None,
            "cache_dir": ".cache/tinyllama",
        },
        "observe": {
            "otlp_endpoint": None,
            "otlp_operations_every": None,
            "on_anomaly": "note",
            "anomaly_window": 128,
            "update_ratio_every": 0,
            "trackers": (),
            "sample_prompts": (),
            "sample_every": None,
            "sample_tokens": 64,
        },
        "checkpointing": {
            "save_every": 1000,
            "checkpoint_dir": "checkpoints",
            "keep_last_n": 3,
            "keep_best": False,
        },
        "preference": {"beta": 0.1, "label_smoothing": 0.0},
        "distillation": {"teacher": None, "temperature": 1.0, "alpha": 0.5, "top_k": 64},
        "lora": {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "use_rslora": False,
        },
        "qlora": {"quantize_base": True, "bits": 4, "block_size": 64, "requantize": False},
    }
    model = Config().model
    assert (model.rms_norm_eps, model.tie_word_embeddings, model.base) == (1e-5, False, None)
    assert (Config().lora, Config().qlora) == (None, None)


# --- values that stand for others ---


def test_what_is_not_set_stays_none_and_is_resolved_by_properties() -> None:
    config = toml("[model]\nnum_heads = 4\nmax_seq_len = 96\nvocab_size = 77")
    assert (config.model.num_kv_heads, config.model.kv_heads) == (None, 4)
    assert (config.data.context_length, config.context_length) == (None, 96)
    assert (config.training.micro_batch_size, config.training.micro_batch) == (None, 32)
    assert config.training.accumulation_steps == 1
    assert (config.data.tokenizer, config.tokenizer_source) == (None, "train")
    assert (config.data.tokenizer_vocab_size, config.tokenizer_vocab_size) == (None, 77)


def test_what_is_set_comes_before_what_it_would_stand_for() -> None:
    config = toml(
        "[model]\nnum_heads = 4\nnum_kv_heads = 2\nbase = 'b'\n[data]\ncontext_length = 5\n"
        "tokenizer = 't'\ntokenizer_vocab_size = 9\n[training]\nmicro_batch_size = 8"
    )
    assert config.model.kv_heads == 2
    assert config.context_length == 5
    assert (config.training.micro_batch, config.training.accumulation_steps) == (8, 4)
    assert (config.tokenizer_source, config.tokenizer_vocab_size) == ("t", 9)
    assert toml("", "model.base=b").tokenizer_source == "b"


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
def test_head_dim_times_heads_is_the_hidden_size_and_a_neighbour_is_refused(
    hidden: int, heads: int, head_dim: int
) -> None:
    assert LlamaConfig(hidden_size=hidden, num_heads=heads).head_dim == head_dim
    wrong_sizes = (hidden - 1, hidden + 1) if heads > 1 else (hidden - 1,)
    for wrong in wrong_sizes:
        with pytest.raises(ConfigError, match=f"model.hidden_size: got {wrong}, must be"):
            LlamaConfig(hidden_size=wrong, num_heads=heads)


def test_lora_scale_and_modules() -> None:
    lora = LoraConfig(rank=16, alpha=64.0)
    assert lora.scale == 4.0
    assert dataclasses.replace(lora, use_rslora=True).scale == 16.0
    assert lora.modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(LoraConfig(target_modules="all-linear").modules) - set(lora.modules) == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_sizes_past_64_bits_are_kept_exactly() -> None:
    config = toml(f"[model]\nvocab_size = {2**70 + 1}\nhidden_size = {12 * 2**80}")
    assert config.model.vocab_size == 2**70 + 1
    assert config.model.head_dim == 2**80
    huge = LlamaConfig(vocab_size=10**5000)
    assert toml(Config(model=huge).to_toml()).model == huge


def test_integers_serve_as_floats_and_lists_as_tuples() -> None:
    config = toml("[lora]\nalpha = 8\ntarget_modules = ['v_proj']\n[data]\ntrain_path = ['a', 'b']")
    assert config.lora is not None
    assert (config.lora.alpha, type(config.lora.alpha)) == (8.0, float)
    assert config.lora.target_modules == ("v_proj",)
    assert config.data.train_path == ("a", "b")
    assert toml("[data]\ntrain_path = ['a']").data.train_path == ("a",)
    from_list: Any = ["v_proj"]
    assert hash(LoraConfig(target_modules=from_list)) == hash(
        LoraConfig(target_modules=("v_proj",))
    )


# --- the module ---


def test_every_error_is_a_tinyllama_error() -> None:
    from tinyllama import errors

    found = (value for value in vars(errors).values() if isinstance(value, type))
    classes = [cls for cls in found if cls.__module__ == errors.__name__]
    assert len(classes) == 8
    assert all(issubclass(cls, TinyllamaError) for cls in classes)
    assert all(f"-- {cls.__name__} " in (errors.__doc__ or "") for cls in classes[1:])


def test_configuration_loads_without_numeric_libraries() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tinyllama.config\n"
        "print([name for name in ('tinygrad', 'numpy', 'torch') if name in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", script, root], check=True, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "[]"


# --- what is said of a configuration ---


@pytest.mark.parametrize(
    ("text", "batch", "last"),
    [
        ("", " on 32 x 2048 tokens per step", ", and training.batch_size"),
        ("[data]\ncontext_length = 64", " on 32 x 64 tokens per step", ", and training.batch_size"),
        ("[training]\nbatch_size = 2", "", ""),
        ("[training]\nmicro_batch_size = 2", "", ""),
    ],
)
def test_who_sets_no_size_reads_which_ones_are_trained(text: str, batch: str, last: str) -> None:
    assert defaults_notice(toml(text)) == (
        "the configuration sets neither sizes of [model] nor model.base: this trains the sizes of"
        f" 124m{batch}; set model.hidden_size, model.num_layers, ... or model.base{last}"
    )


@pytest.mark.parametrize("text", ["[model]\nnum_layers = 2", '[model]\nbase = "folder"'])
def test_who_sets_a_size_or_a_base_reads_nothing(text: str) -> None:
    assert defaults_notice(toml(text)) is None


def test_help_has_the_options_below_the_name_of_their_section() -> None:
    lines = option_help().split("\n")
    names = [line for line in lines if line.startswith("[")]
    assert names == [f"[{name}]" for name in SECTIONS]
    assert all(lines[lines.index(name) - 1] == "" for name in names[1:])
    assert lines[:2] == ["[model]", "  model.vocab_size = 32000"] and lines[-1] == ""
    assert lines[lines.index("[lora]") + 1].startswith("  lora.rank = ")


def test_each_value_of_a_base_that_is_overridden_is_a_line() -> None:
    base = LlamaConfig(rope_theta=1e6, max_seq_len=4096)
    config = toml("[model]\nrope_theta = 5e5\nmax_seq_len = 8192\nbase = 'b'").with_base(base, "b")
    assert config.overridden(base, "b/config.json") == [
        "x.toml: model.max_seq_len: 8192 is used instead of 4096, which b/config.json has",
        "x.toml: model.rope_theta: 500000.0 is used instead of 1000000.0, which b/config.json has",
    ]
    assert toml("[model]\nbase = 'b'").with_base(base, "b").overridden(base, "b") == []


def test_a_scaling_keeps_the_length_that_the_base_was_first_trained_on() -> None:
    yarn = '[model]\nbase = "b"\nmax_seq_len = 256\n'
    yarn += '[model.rope_scaling]\nrope_type = "yarn"\nfactor = 4.0\n'
    first = RopeScaling("yarn", 2.0, 16)
    for base, trained in (
        (LlamaConfig(max_seq_len=64), 64),
        (LlamaConfig(max_seq_len=64, rope_scaling=first), 16),
    ):
        assert toml(yarn).with_base(base, "b").model.scaling == RopeScaling("yarn", 4.0, trained)
