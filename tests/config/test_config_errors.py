"""Wrong configurations: what is refused, and what exactly is said about it."""

import dataclasses
import os
import time
from pathlib import Path

import pytest
from processor_time import within

from tinyllama.config import (
    CheckpointingConfig,
    Config,
    DataConfig,
    LlamaConfig,
    LoraConfig,
    LRScheduleConfig,
    QloraConfig,
    TrainingConfig,
    config_from_toml,
    load_config,
)
from tinyllama.errors import ConfigError


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text, "x.toml", overrides)
    return str(caught.value).split("\n")


def only_problem(text: str, *overrides: str) -> str:
    (problem,) = problems(text, *overrides)
    return problem


def toml(text: str = "", *overrides: str) -> Config:
    return config_from_toml(text, "x.toml", overrides)


# --- refusals: text and values ---


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("model.num_layers = 0", "got 0, must be an integer of 1 or more"),
        ("model.num_layers = 2.0", "got 2.0, must be an integer of 1 or more"),
        ("model.num_layers = true", "got true, must be an integer of 1 or more"),
        ("model.num_layers = '2'", 'got "2", must be an integer of 1 or more'),
        ("model.intermediate_size = 0", "got 0, must be an integer of 1 or more"),
        ("model.rope_theta = 0", "got 0, must be a finite number more than 0"),
        ("model.tie_word_embeddings = 1", "got 1, must be true or false"),
        ("model.base = ''", 'got "", must be a string that is not empty'),
        (
            'observe.otlp_endpoint = "localhost:4318"',
            'got "localhost:4318", must be an address that begins with http:// or https://',
        ),
        ("training.learning_rate = nan", "got nan, must be a finite number more than 0"),
        ("training.learning_rate = 1e999", "got inf, must be a finite number more than 0"),
        ("training.learning_rate = true", "got true, must be a finite number more than 0"),
        ("training.beta2 = 1", "got 1, must be a finite number of 0 or more and less than 1"),
        ("training.weight_decay = -0.1", "got -0.1, must be a finite number of 0 or more"),
        ("training.dtype = 'fp16'", 'got "fp16", must be "float32", "bfloat16" or "float16"'),
        (
            "training.seed = 4294967296",
            "got 4294967296, must be an integer of 0 or more and at most 4294967295",
        ),
        ("training.seed = 2024-01-02", "got 2024-01-02, must be an integer of 0 or more"),
        ("training.seed = {a = [1]}", 'got {"a" = [1]}, must be an integer of 0 or more'),
        ("lr_schedule.warmup_steps = -1", "got -1, must be an integer of 0 or more"),
        ("data.train_path = []", "got [], must be a string that is not empty or a list of one or"),
        ("data.val_path = [1]", "got [1], must be a string that is not empty or a list of one or"),
        ('data.cache_dir = "a\\u0000"', 'got "a\\u0000", must be a string that is not empty'),
        ("data.train_on = 'user'", 'got "user", must be "all", "assistant" or "last"'),
        ("lora.rank = 0", "got 0, must be an integer of 1 or more"),
        (
            "lora.target_modules = ['lm_head']",
            'got ["lm_head"], must be "all-linear" or a list of one or more, each "q_proj", ',
        ),
        (
            "lora.target_modules = ['q_proj', 'q_proj']",
            'got ["q_proj", "q_proj"], must be names that differ from each other',
        ),
        ("qlora.bits = 8", "got 8, must be 4"),
        ("qlora.block_size = 33", "got 33, must be an integer of 2 or more and a multiple of 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_key_and_what_is_allowed(line: str, said: str) -> None:
    key = line.partition(" ")[0]
    text = line if not key.startswith("qlora") else f"lora.rank = 8\n{line}"
    assert only_problem(text).startswith(f"x.toml: {key}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[model]\nhidden_size = 770",
            "model.hidden_size: got 770, must be divisible by model.num_heads, which is 12",
        ),
        (
            "[model]\nhidden_size = 36",
            "model.hidden_size: got 36, must be an even multiple of model.num_heads, which is 12: "
            "rotary embeddings turn pairs",
        ),
        (
            "[model]\nnum_kv_heads = 5",
            "model.num_heads: got 12, must be divisible by model.num_kv_heads, which is 5",
        ),
        (
            "[training]\nfloat32_products = 'bfloat16x3'\ndtype = 'bfloat16'",
            'training.float32_products: got "bfloat16x3", must be "exact" where training.dtype is '
            '"bfloat16"',
        ),
        (
            "[training]\nmicro_batch_size = 5",
            "training.micro_batch_size: got 5, must be a divisor of training.batch_size, which is "
            "32",
        ),
        (
            "[data]\ncontext_length = 2049",
            "data.context_length: got 2049, must be at most model.max_seq_len, which is 2048",
        ),
        (
            "[data]\ntokenizer_vocab_size = 32001",
            "data.tokenizer_vocab_size: got 32001, must be at most model.vocab_size, which is "
            "32000",
        ),
        (
            "[lr_schedule]\nmin_lr = 0.00031",
            "lr_schedule.min_lr: got 0.00031, must be at most training.learning_rate, which is "
            "0.0003",
        ),
        (
            "[qlora]",
            "[qlora] packs a base for adapters: add a [lora] section, or remove [qlora]",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(text: str, said: str) -> None:
    assert only_problem(text) == f"x.toml: {said}"


def test_values_at_the_edge_of_what_fits_are_accepted() -> None:
    toml(
        "[model]\nhidden_size = 24\nnum_kv_heads = 12\n[training]\nmicro_batch_size = 32\n"
        "learning_rate = 3e-4\nbeta1 = 0\nseed = 4294967295\n[lr_schedule]\nmin_lr = 3e-4\n"
        "[data]\ncontext_length = 2048\ntokenizer_vocab_size = 32000\n"
        "[qlora]\nquantize_base = false\nblock_size = 2"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nhidden_sizes = 1", "model.hidden_sizes: unknown key, the nearest is model.hid"),
        ("[training]\nlr = 1", "training.lr: unknown key, the nearest is training.learning_rate"),
        ("[training]\nrank = 1", "training.rank: unknown key, the nearest is lora.rank"),
        ("[lora]\nr = 8", "lora.r: unknown key, the nearest is lora.rank"),
        ("[trainin]\nseed = 1", "trainin: unknown section, the nearest is [training]"),
        ("seed = 1", "seed: unknown key, the nearest is training.seed"),
        ("warmup_step = 1", "warmup_step: unknown key, the nearest is lr_schedule.warmup_steps"),
        ("model = 3", "model: got 3, must be a section, [model]"),
        (
            "[[data]]\ntrain_path = 'x'",
            'data: got [{"train_path" = "x"}], must be a section, [data]',
        ),
    ],
)
def test_an_unknown_key_or_section_is_refused_with_the_nearest(text: str, said: str) -> None:
    assert only_problem(text).startswith(f"x.toml: {said}")


def test_all_problems_are_reported_at_once_each_on_its_line() -> None:
    assert problems(
        "[model]\nnum_layers = 0\nhidden_size = 770\n[trainin]\n[training]\nbeta1 = 2\nlrate = 1",
        "lora.rank=x",
        "data.context_length=9999",
        "oops",
    ) == [
        "x.toml: model.num_layers: got 0, must be an integer of 1 or more",
        "x.toml: trainin: unknown section, the nearest is [training]",
        "x.toml: training.beta1: got 2, must be a finite number of 0 or more and less than 1",
        "x.toml: training.lrate: unknown key, the nearest is training.learning_rate",
        '--set lora.rank=x: got "x", must be an integer of 1 or more',
        "--set oops: must have the form section.key=value",
        "x.toml: model.hidden_size: got 770, must be divisible by model.num_heads, which is 12",
        "--set data.context_length=9999: got 9999, must be at most model.max_seq_len, which is "
        "2048",
    ]


def test_a_section_made_in_python_is_checked_like_one_from_a_file() -> None:
    with pytest.raises(ConfigError) as caught:
        LlamaConfig(num_layers=-1, hidden_size=100, num_heads=3)
    assert str(caught.value).split("\n") == [
        "model.num_layers: got -1, must be an integer of 1 or more",
        "model.hidden_size: got 100, must be divisible by model.num_heads, which is 3",
    ]
    with pytest.raises(ConfigError, match="got nothing, must be an integer of 1 or more"):
        TrainingConfig(batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data.context_length: got 4096, must be at most model"):
        Config(data=DataConfig(context_length=4096))
    for section, key in (
        (lambda: TrainingConfig(beta1=1), "training.beta1"),
        (lambda: LRScheduleConfig(warmup_steps=-1), "lr_schedule.warmup_steps"),
        (lambda: DataConfig(cache_dir=""), "data.cache_dir"),
        (lambda: CheckpointingConfig(save_every=0), "checkpointing.save_every"),
        (lambda: LoraConfig(rank=0), "lora.rank"),
        (lambda: QloraConfig(block_size=1), "qlora.block_size"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}: got \S+, must be"):
            section()
    with pytest.raises(ConfigError, match=r"^\[qlora\] packs a base for adapters: add a \[lora\]"):
        Config(qlora=QloraConfig())


def test_text_that_no_file_can_hold_is_refused_and_its_neighbours_are_not() -> None:
    for text in ("\ud800", "a\udfff", "\0"):
        with pytest.raises(ConfigError, match=r"data.cache_dir: got "):
            DataConfig(cache_dir=text)
        with pytest.raises(ConfigError, match=r"data.train_path: got "):
            DataConfig(train_path=("fine", text))
    for text in ("\ud7ff", "\ue000", "\x01", "\x7f"):
        assert toml(Config(data=DataConfig(cache_dir=text)).to_toml()).data.cache_dir == text


def test_a_long_value_is_shortened_in_its_message() -> None:
    said = only_problem(f"[training]\nseed = '{'y' * 5000}'")
    assert len(said) < 250
    assert "yyy..., must be" in said


def test_configurations_are_frozen() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 3  # type: ignore[misc]
    assert isinstance(hash(config), int)


# --- files ---


def test_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(
        b"\xef\xbb\xbf[model]\r\nnum_layers = 3\r\n[data]\r\ntrain_path = '\xc3\xa9'\r\n"
    )
    config = load_config(path)
    assert (config.model.num_layers, config.data.train_path) == (3, "é")
    assert toml("\ufeff[model]\nnum_layers = 3").model.num_layers == 3


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return str(caught.value)

    absent, folder = tmp_path / "no.toml", tmp_path
    names = "124m, 7b, demo or lora"
    assert said(absent) == f"{absent}: no such file; configurations by name: {names}"
    assert said(folder) == f"{folder}: is a folder, must be a TOML file"
    (tmp_path / "utf16.toml").write_bytes("[model]".encode("utf-16"))
    assert said(tmp_path / "utf16.toml") == f"{tmp_path}/utf16.toml: not UTF-8 text (byte 0)"
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[model]\nnum_layers = 0")
    assert said(wrong) == f"{wrong}: model.num_layers: got 0, must be an integer of 1 or more"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[model]\nnum_layers =\n", "Invalid value (at line 2, column 13)"),
        ("[model]\n[model]", "Cannot declare ('model',) twice (at line 2, column 7)"),
        ("a = " + "1" * 5000, "Exceeds the limit (4300 digits)"),
        ("a = " + "[" * 2000, "TOML inline arrays/tables are nested more than"),
    ],
)
def test_bad_toml_is_named_with_its_line(text: str, reason: str) -> None:
    assert only_problem(text).startswith(f"x.toml: not valid TOML: {reason}")


def test_a_message_is_a_screenful_whatever_the_file_holds() -> None:
    text = "[training]\n" + "".join(f"unheard_of_{n} = 1\n" for n in range(1000))
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text, "c.toml")
    lines = str(caught.value).split("\n")
    assert len(lines) == 22
    assert lines[0].startswith("c.toml: training.unheard_of_0: unknown key")
    assert lines[20] == "... and 979 more lines"
    assert lines[21].startswith("c.toml: training.unheard_of_999: unknown key")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[training]\n" + ".".join("a" * 300_000) + " = 1",
            "A key of more than 32 parts (at line 2)",
        ),
        ("[training]\n\nx = 1\n" + ".".join(['"a=b"'] * 100_000) + " = 1", "32 parts (at line 4)"),
        ("[" + ".".join("a" * 900) + "]\n" + ".".join("b" * 31) + " = 1", "32 parts (at line 1)"),
        ("[[" + ".".join("a" * 900) + "]]\nb = 1", "32 parts (at line 1)"),
        ("[training]\n" + "".join(f"k{n} = 1\n" for n in range(90_000)), "k0: unknown key, the"),
        ("".join(f"[s{n}]\n" for n in range(90_000)), "x.toml: s0: unknown section, the nearest"),
        ("[training]\n" + "k" * 900_000 + " = 1", "training.kkk"),
        ("[" + "k" * 900_000 + "]", "x.toml: kkk"),
        ('[training]\n"\\u001b[2J" = 1', r"training.\x1b[2J: unknown key"),
        ("[training]\nlearning_rate" + ".a" * 30 + " = 1", "learning_rate: got {"),
        ("[training]\nmax_steps = 0x" + "f" * 900_000, "max_steps: got 0xffff"),
        ("[training]\nlearning_rate = 1" + "0" * 400, "number more than 0 and below 2^128"),
        ('[training]\ndtype = "' + "float32," * 100_000 + '"', 'dtype: got "float32,'),
        ("[training]\nlearning_rate = [" + "1," * 400_000 + "]", "learning_rate: got [1, 1,"),
    ],
    ids=lambda text: "".join(filter(str.isalnum, text[:30])),
)
def test_hostile_toml_is_refused_in_short_lines_in_time(text: str, said: str) -> None:
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text, "x.toml")
    assert time.process_time() - begun < within(2)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 22 and said in lines[0]
    assert all(line.isprintable() and len(line) < 1000 for line in lines)


def test_only_a_small_regular_file_is_read_as_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    for make, said in (
        (lambda: os.mkfifo(file), "is no regular file"),
        (lambda: file.symlink_to("/dev/zero"), "is no regular file"),
        (lambda: file.write_bytes(b"#" * (1 << 21)), "2097152 bytes, at most 1048576 are allowed"),
    ):
        make()
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value) == f"{file}: {said}"
        file.unlink()


def test_names_with_many_dots_are_no_long_key() -> None:
    files = ", ".join(f'"{n}.a.b.c"' for n in range(100))
    text = f"[data]\ntrain_path = [{files}]\n[observe]\nsample_prompts = ['''\na.b.c. d\n''']"
    assert len(config_from_toml(text, "x.toml").data.train_path) == 100
