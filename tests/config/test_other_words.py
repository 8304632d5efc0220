"""What users of other trainers write is answered with what to write here."""

import re

import pytest

from tinyllama.cli import other_words as options
from tinyllama.cli.app import COMMANDS
from tinyllama.cli.arguments import Parser
from tinyllama.config import SECTIONS, config_from_toml, other_words
from tinyllama.config.options import options_of
from tinyllama.errors import ConfigError

KEYS = {option.key for name, cls in SECTIONS.items() for option in options_of(name, cls)}


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text, "x.toml", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[lora]\nuse_dora = true", "lora.use_dora: unknown key: there is no DoRA, only LoRA"),
        ("[training]\noptimizer = 'sgd'", "unknown key: the optimizer is AdamW"),
        ("gradient_accumulation_steps = 4", "unknown key: set training.batch_size to the"),
        ("[training]\nreport_to = 'wandb'", "unknown key: every step writes a line to metrics"),
        ("[training]\nbf16 = true", 'unknown key: write training.dtype = "bfloat16"'),
        ("fp16 = true", 'fp16: unknown key: write training.dtype = "float16"'),
        ("[model]\nlr = 1", "model.lr: unknown key, the nearest is training.learning_rate"),
        ("learning_rate = 1", "unknown key, the nearest is training.learning_rate"),
        ("[training]\nmax_length = 8", "unknown key, the nearest is data.context_length"),
        ("[training]\nblock_size = 8", "unknown key: write data.context_length for the length"),
        ("[training]\niters = 8", "unknown key, the nearest is training.max_steps"),
        ("[lora]\nlora_alpha = 8", "unknown key, the nearest is lora.alpha"),
        ("[training]\nload_in_4bit = true", "unknown key, the nearest is qlora.quantize_base"),
        ("[optim]\nlr = 1", "x.toml: optim: unknown section, the nearest is [training]"),
        (
            "[training]\nper_device_train_batch_size = 1",
            "unknown key, the nearest is training.micro_batch_size",
        ),
    ],
)
def test_a_key_of_another_trainer_is_answered(text: str, answer: str) -> None:
    found = problem(text)
    assert answer in found and len(found.splitlines()) == 1


def test_an_override_of_another_trainer_is_answered() -> None:
    assert problem("", "lr=1") == (
        "--set lr=1: must have the form section.key=value, here training.learning_rate"
    )
    assert problem("", "bf16=true") == (
        '--set bf16=true: unknown key: write training.dtype = "bfloat16"'
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[lora]\ntarget_modules = 'q_proj,v_proj'", ': write ["q_proj", "v_proj"]'),
        ("[lora]\ntarget_modules = ['q_proj,v_proj']", ': write ["q_proj", "v_proj"]'),
        ("[lora]\ntarget_modules = 'q_proj'", ': write ["q_proj"]'),
        ("[lora]\ntarget_modules = 'all'", ': write "all-linear"'),
        ("[training]\ndtype = 'bf16'", ': write "bfloat16"'),
        ("[training]\ndtype = 'Float32'", ': write "float32"'),
    ],
)
def test_a_value_of_another_trainer_is_answered(text: str, answer: str) -> None:
    assert problem(text).endswith(answer)
    key, _, value = text.partition("\n")[2].partition(" = ")
    section = text[1 : text.index("]")]
    assert problem("", f"{section}.{key}={value}").endswith(answer)


def test_a_value_that_means_nothing_gets_no_suggestion() -> None:
    assert problem("[training]\ndtype = 'int3'").endswith('"bfloat16" or "float16"')
    assert problem("[lora]\ntarget_modules = 'q_proj,x'").endswith('"up_proj" or "down_proj"')


def test_every_answer_names_keys_that_exist() -> None:
    assert len(other_words.WORDS) > 100
    sections = "|".join(SECTIONS)
    for word, answer in other_words.WORDS.items():
        named = re.findall(rf"\b(?:{sections})\.\w+", answer)
        assert set(named) <= KEYS, word
        assert " " in answer or answer in KEYS, word
    assert set(other_words.SECTIONS.values()) <= set(SECTIONS)
    assert not set(other_words.SECTIONS) & set(SECTIONS)


def test_every_answer_of_the_command_line_is_an_option_of_a_command_or_a_sentence() -> None:
    known: set[str] = set()
    for module in COMMANDS.values():
        parser = Parser()
        module.add_options(parser)
        known |= set(parser._option_string_actions)
    for word, answer in options.WORDS.items():
        assert " " in answer or answer in known, word


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["generate", "--max-tokens", "5"], "--max-tokens: here it is called --max-new-tokens"),
        (["generate", "--max_new_tokens=5"], "here it is called --max-new-tokens"),
        (["generate", "--lora", "x"], "--model takes an adapter's folder"),
        (["train", "124m", "--lr", "1"], "--lr: write --set training.learning_rate=VALUE"),
        (["train", "124m", "--batch-size=3"], "write --set training.batch_size=VALUE"),
        (["train", "124m", "--bf16"], '--bf16: write training.dtype = "bfloat16"'),
        (["train", "--config", "124m"], "the configuration is typed without an option"),
        (["memory", "--batch-size", "3"], "here it is called --batch"),
        (["evaluate", "--lr", "3"], "no option --lr (see tinyllama evaluate"),
        (["plot", "--adapter", "3"], "no option --adapter (see tinyllama plot"),
    ],
)
def test_an_option_of_another_program_is_answered(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from runs_helpers import cli

    assert cli(*words) == 2
    error = capsys.readouterr().err
    assert answer in error and len(error.splitlines()) == 1
