"""Whole models for other programs: what is written, that it is checked, and that half is never."""

import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from export_helpers import (
    CONFIG,
    fields_of,
    gguf_name,
    in_gguf_order,
    relative,
    tensors_of,
    write_model,
)
from gguf_helpers import random_blocks
from gguf_helpers import write_gguf as write_random_gguf
from runs_helpers import finished_run, tokenizer

from tinyllama.cli.app import main
from tinyllama.config import LlamaConfig, RopeScaling
from tinyllama.convert import export_model as module
from tinyllama.convert.check import Check, compare
from tinyllama.convert.export import Job, export
from tinyllama.errors import ConfigError, TokenizerError, WeightsError
from tinyllama.formats.gguf import GgufFile
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.models import open_model
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.tokenizers.opening import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "base"
    return folder, write_model(folder)


def run(*words):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


# Type -> (of matrices, of the embedding, largest relative difference).
@pytest.mark.parametrize(
    ("chosen", "matrices", "table", "limit"),
    [
        (None, "F32", "F32", 0),
        ("F16", "F16", "F16", 4e-4),
        ("BF16", "BF16", "BF16", 3e-3),
        ("Q8_0", "Q8_0", "Q8_0", 8e-3),
        ("Q4_0", "Q4_0", "Q8_0", 0.11),
    ],
)
def test_a_gguf_file_holds_the_weights_in_llama_cpps_order(
    base, tmp_path, chosen, matrices, table, limit
):
    folder, weights = base
    export(Job(folder, tmp_path / "out", "gguf", chosen))
    stored = tensors_of(tmp_path / "out" / "model.gguf")
    assert stored.keys() == {gguf_name(name) for name in weights}
    for name, weight in weights.items():
        kind, values = stored[gguf_name(name)]
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert kind == ("F32" if weight.ndim == 1 else table if is_table else matrices), name
        expected = in_gguf_order(name, weight)
        if kind == "F32":
            assert np.array_equal(values, expected), name
        else:
            assert 0 < relative(values, expected) <= limit, name


def test_metadata_are_those_that_llama_cpp_needs(base, tmp_path):
    export(Job(base[0], tmp_path / "tiny.gguf", "gguf", "Q8_0"))
    fields = fields_of(tmp_path / "tiny.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 416,
        "llama.context_length": 96,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-4)),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {key: fields[key] for key in expected} == expected


def test_a_gguf_file_of_a_name_gets_a_modelfile_beside_it(base, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        export(Job(base[0], tmp_path / name, "gguf"))
    files = {"a.gguf", "Modelfile", "b.gguf", "b.Modelfile"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (tmp_path / "Modelfile").read_text() == 'FROM ./a.gguf\nPARAMETER stop "</s>"\n'
    assert (tmp_path / "b.Modelfile").read_text().startswith("FROM ./b.gguf\n")


def test_hugging_face_to_gguf_and_back_is_the_same_bits(base, tmp_path):
    folder, weights = base
    export(Job(folder, tmp_path / "a.gguf", "gguf", "F32"))
    opened = GgufFile(tmp_path / "a.gguf")
    opened.check()
    assert opened.config == open_folder(folder).config
    for name, weight in weights.items():
        assert opened.float32(name).tobytes() == weight.tobytes(), name


@pytest.mark.parametrize("target", ["hf", "mlx"])
@pytest.mark.parametrize(("chosen", "name"), [(None, "float32"), ("BF16", "bfloat16")])
def test_folders_open_with_their_tokenizer(base, tmp_path, target, chosen, name):
    folder, weights = base
    done = export(Job(folder, tmp_path / "out", target, chosen))
    opened = open_folder(tmp_path / "out")
    assert opened.config == open_folder(folder).config
    assert opened.entries["dtype"] == name and opened.eos_ids == (2,) and opened.bos_id == 1
    for key, weight in weights.items():
        assert relative(opened.float32(key), weight) <= (0 if chosen is None else 3e-3)
    text = "def f(x):\n    return x"
    assert open_tokenizer(tmp_path / "out").encode(text) == tokenizer().encode(text)
    assert done.check.same >= 60 and done.check.tokens == 64


def test_the_stored_type_is_the_default(tmp_path):
    write_model(tmp_path / "base", dtype="bfloat16")
    export(Job(tmp_path / "base", tmp_path / "a.gguf", "gguf"))
    export(Job(tmp_path / "base", tmp_path / "hf", "hf"))
    assert GgufFile(tmp_path / "a.gguf").stored_type("model.layers.0.mlp.up_proj.weight") == "BF16"
    assert open_folder(tmp_path / "hf").dtype("model.layers.0.mlp.up_proj.weight") == "BF16"


def test_rows_that_no_block_divides_are_float16_and_said(tmp_path):
    config = LlamaConfig(**{**CONFIG.__dict__, "intermediate_size": 72})
    write_model(tmp_path / "base", config)
    done = export(Job(tmp_path / "base", tmp_path / "a.gguf", "gguf", "Q8_0"))
    opened = GgufFile(tmp_path / "a.gguf")
    assert opened.stored_type("model.layers.0.mlp.down_proj.weight") == "F16"
    assert opened.stored_type("model.layers.0.mlp.up_proj.weight") == "Q8_0"
    assert done.notes == ("2 tensors are F16: their rows are no multiple of 32",)


SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "yarn": RopeScaling("yarn", 8.0, 32),
    "llama3": RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    "llama3 with other numbers": RopeScaling("llama3", 8.0, 24, 1.2, 3.0),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_frequencies_are_read_back(tmp_path, kind):
    config = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": SCALINGS[kind]})
    write_model(tmp_path / "base", config)
    export(Job(tmp_path / "base", tmp_path / "a.gguf", "gguf"))
    assert open_model(tmp_path / "a.gguf").config.rope_scaling == SCALINGS[kind]
    factors = tensors_of(tmp_path / "a.gguf").get("rope_freqs.weight")
    assert (factors is not None) == kind.startswith("llama3")


VARIANTS = {
    "every bias": {"attention_bias": True, "mlp_bias": True},
    "biases of q, k and v": {"attention_bias": "qkv"},
    "wide heads": {"head_size": 32},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_variants_of_the_model_are_read_back(tmp_path, kind, target):
    config = LlamaConfig(**{**CONFIG.__dict__, **VARIANTS[kind]})
    weights = write_model(tmp_path / "base", config)
    out = tmp_path / ("a.gguf" if target == "gguf" else "out")
    assert export(Job(tmp_path / "base", out, target)).check.largest == 0
    opened = open_model(out)
    assert opened.config == open_model(tmp_path / "base").config
    assert all(np.array_equal(opened.float32(name), value) for name, value in weights.items())
    if target == "gguf" and "bias" in kind:
        name = "model.layers.1.self_attn.k_proj.bias"
        stored = tensors_of(out)["blk.1.attn_k.bias"]
        assert stored[0] == "F32"
        assert np.array_equal(stored[1], in_gguf_order(name, weights[name][:, None])[:, 0])


def test_a_sliding_window_bounds_the_context_and_is_said(tmp_path):
    config = LlamaConfig(**{**CONFIG.__dict__, "sliding_window": 64})
    write_model(tmp_path / "base", config)
    done = export(Job(tmp_path / "base", tmp_path / "a.gguf", "gguf"))
    assert done.notes == ("llama.cpp has no sliding window here: the context is 64, not 96",)
    opened = open_model(tmp_path / "a.gguf")
    assert (opened.config.max_seq_len, opened.config.sliding_window) == (64, None)


def test_llama_3s_factors_are_those_of_its_own_code():
    """As Meta's apply_scaling computes them, with rope_theta 500000 and heads 128 wide."""
    config = LlamaConfig(
        hidden_size=256, num_heads=2, rope_theta=500000.0, rope_scaling=SCALINGS["llama3"]
    )
    factors = module.rope_factors(config)["rope_freqs.weight"].load()
    for i, factor in enumerate(factors):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            new = frequency
        elif wavelength > 8192:
            new = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            new = (1 - smooth) * frequency / 8 + smooth * frequency
        assert frequency / new == pytest.approx(factor, rel=1e-6)
    assert factors[0] == 1 and factors[-1] == 8


def test_what_no_gguf_file_can_hold_is_refused_by_name(tmp_path):
    for number, scaling in enumerate(
        (RopeScaling("dynamic", 2.0), RopeScaling("yarn", 2.0, attention_factor=1.5))
    ):
        config = LlamaConfig(**{**CONFIG.__dict__, "rope_scaling": scaling})
        write_model(tmp_path / f"base{number}", config)
        with pytest.raises(ConfigError, match=r"rope_scaling.*(dynamic|attention_factor)"):
            export(Job(tmp_path / f"base{number}", tmp_path / "a.gguf", "gguf"))
    write_model(tmp_path / "bare", files={})
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        export(Job(tmp_path / "bare", tmp_path / "a.gguf", "gguf"))
    assert export(Job(tmp_path / "bare", tmp_path / "hf", "hf")).check.largest == 0


def test_blocks_of_a_gguf_source_pass_unchanged(tmp_path):
    for kind in ("Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16"):
        source = tmp_path / f"{kind}.gguf"
        write_random_gguf(source, kind)
        out = tmp_path / f"{kind}-out.gguf"
        assert export(Job(source, out, "gguf")).check.largest == 0
        a, b = GgufFile(source), GgufFile(out)
        assert a.names == b.names
        assert all(a.stored(name).tobytes() == b.stored(name).tobytes() for name in a.names)
        assert fields_of(out)["tokenizer.ggml.tokens"] == fields_of(source)["tokenizer.ggml.tokens"]


def test_the_larger_of_the_blocks_of_a_gguf_source_are_widened_for_a_folder(tmp_path):
    values = write_random_gguf(tmp_path / "a.gguf", "Q4_K")
    export(Job(tmp_path / "a.gguf", tmp_path / "hf", "hf"))
    opened = open_folder(tmp_path / "hf")
    assert all(np.array_equal(opened.float32(name), value) for name, value in values.items())
    assert random_blocks("Q4_K", (2, 256), 0).shape == (2, 144)


# ---- never half, never wrong


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_destination_that_exists_is_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.gguf").touch()
    for name in ("out", "a.gguf"):
        with pytest.raises(WeightsError, match="exists already: name a new one"):
            export(Job(base[0], tmp_path / name, "gguf"))
    assert left_in(tmp_path) == ["a.gguf", "out"] and not left_in(tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "a.gguf"])
def test_an_export_that_reads_back_wrong_leaves_nothing(base, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "permuted", lambda name, config, rows: rows)
    with pytest.raises(WeightsError, match=r"q_proj\.weight: differs from its source by"):
        export(Job(base[0], tmp_path / name, "gguf"))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("target", "dtype"), [("gguf", None), ("hf", None), ("hf", "F16")])
def test_values_that_no_model_has_are_named_with_the_name_that_was_asked_for(
    base, tmp_path, target, dtype
):
    """NaN, and what the chosen type cannot hold; never the name of a half-written folder."""
    folder = shutil.copytree(base[0], tmp_path / "base")
    file = folder / "model.safetensors"
    arrays = {n: np.array(SafetensorsFile(file).array(n), np.float32) for n in base[1]}
    arrays["model.norm.weight"][0] = np.nan if dtype is None else 1e30
    write_safetensors(file, arrays)
    out = tmp_path / ("a.gguf" if target == "gguf" else "out")
    with pytest.raises(WeightsError) as caught:
        export(Job(folder, out, target, dtype))
    expected = "would hold a value that is not finite" if dtype is None else r"1e\+30 is too large"
    named = rf"{re.escape(str(out))}[^ ]*: model\.norm\.weight: {expected}"
    assert re.match(named, str(caught.value))
    assert left_in(tmp_path) == ["base"]


def test_a_wrong_configuration_is_seen_in_the_logits(base, tmp_path, monkeypatch):
    def wrong(config, kinds, name):
        return written(config, kinds, name) | {"llama.rope.freq_base": 50.0}

    written = module.model_fields
    monkeypatch.setattr(module, "model_fields", wrong)
    with pytest.raises(WeightsError, match="logits of 64 tokens differ"):
        export(Job(base[0], tmp_path / "a.gguf", "gguf"))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "a.gguf"])
def test_an_interrupted_export_leaves_nothing(base, tmp_path, monkeypatch, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_loaded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(Job(base[0], tmp_path / name, "gguf"))
    assert left_in(tmp_path) == []


def test_a_disk_without_room_is_seen_before_anything_is_written(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(module, "write_gguf", lambda *_: pytest.fail("was written"))
    with pytest.raises(WeightsError, match=r"1,000 bytes are free, the export takes [0-9,]+$"):
        export(Job(base[0], tmp_path / "a.gguf", "gguf"))


def test_memory_stays_at_a_few_tensors_not_at_the_model(tmp_path, monkeypatch):
    """Of what is written; tinygrad is left out, which tracemalloc slows down a hundredfold."""
    config = LlamaConfig(**{**CONFIG.__dict__, "num_layers": 24, "intermediate_size": 512})
    write_model(tmp_path / "base", config)
    monkeypatch.setattr(module, "compare", lambda *_: Check(1, 0.0, 0.0, 1))
    tracemalloc.start()
    export(Job(tmp_path / "base", tmp_path / "out", "gguf", "Q8_0"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    model_bytes = sum(path.stat().st_size for path in (tmp_path / "base").iterdir())
    assert model_bytes > 10e6 and peak < model_bytes / 4


def test_the_comparison_holds_a_layer_not_the_model(base):
    """Arrays that are alive when the next is read."""
    folder, weights = base
    config, given, most = open_folder(folder).config, [], []

    def read(name):
        most.append(sum(each() is not None for each in given))
        values = weights[name].copy()
        given.append(weakref.ref(values))
        return values

    compare((config, read), (config, read), lambda name: "F32", range(8), "x")
    assert len(most) == 2 * len(weights) and max(most) <= 3


# ---- the command


def test_the_command_says_what_it_wrote_and_how_far_it_is(base, tmp_path, capsys):
    assert run("export", base[0], tmp_path / "a.gguf", "--dtype", "bf16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("checked: logits of 64 tokens differ from the source's by at most 0")
    size = (tmp_path / "a.gguf").stat().st_size + (tmp_path / "Modelfile").stat().st_size
    assert lines[1] == f"{tmp_path}/a.gguf, Modelfile: {size:,} bytes, BF16"


def test_a_damaged_checkpoint_is_named_and_not_exported(tmp_path, capsys):
    checkpoint = tmp_path / "final"
    shutil.copytree(finished_run() / "final", checkpoint)
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert run("export", checkpoint, tmp_path / "a.gguf") == 2
    message = capsys.readouterr().err
    assert f"{weights}: changed: SHA-256" in message
    assert left_in(tmp_path) == ["final"]


@pytest.mark.parametrize("target", ["hf", "gguf", "mlx"])
def test_a_link_out_of_the_model_is_not_copied(tmp_path, target):
    """It may lead to any file of this user, and the export is given to others."""
    shutil.copytree(finished_run() / "final", tmp_path / "model")
    (tmp_path / "secret").write_text("SECRET")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=r"chat_template\.jinja: is a link out of its folder"):
        export(Job(tmp_path / "model", tmp_path / "out", target))
    assert left_in(tmp_path) == ["model", "secret"]


def test_a_link_to_itself_ends_no_export_in_a_traceback(tmp_path, capsys):
    shutil.copytree(finished_run() / "final", tmp_path / "model")
    loop = tmp_path / "model" / "chat_template.jinja"
    loop.unlink(missing_ok=True)
    loop.symlink_to(loop)
    assert run("export", tmp_path / "model", tmp_path / "out") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_stands_for_its_final_checkpoint(tmp_path):
    assert run("export", finished_run(), tmp_path / "a.gguf", "--dtype", "q8_0") == 0
    opened, source = open_model(tmp_path / "a.gguf"), open_model(finished_run() / "final")
    assert opened.config == source.config and opened.eos_ids == source.eos_ids


def test_options_that_do_not_fit_together_are_refused(base, tmp_path, capsys):
    for words, problem in (
        (("out", "--dtype", "q4_0"), "--dtype: got q4_0, must be float32, float16 or bfloat16"),
        (("a.gguf", "--to", "hf"), "is the name of a GGUF file: type --to gguf"),
        (("out", "--merged"), "--merged: must be left out:"),
        (("out", "--to", "gguf", "--dtype", "q5_k"), "got 'q5_k', must be one of float32"),
    ):
        assert run("export", base[0], tmp_path / words[0], *words[1:]) == 2
        message = capsys.readouterr().err
        assert problem in message and message.count("\n") == 1
    assert left_in(tmp_path) == []


def test_the_script_is_the_same_command(base, tmp_path):
    command = [sys.executable, "tools/convert.py", base[0], tmp_path / "out", "--dtype", "f16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert open_folder(tmp_path / "out").entries["dtype"] == "float16"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    problem = f"convert: {tmp_path}/out: exists already: name a new one\n"
    assert (done.returncode, done.stderr) == (2, problem)


def test_an_interrupt_leaves_nothing_and_says_so(tmp_path):
    config = LlamaConfig(**{**CONFIG.__dict__, "num_layers": 24, "intermediate_size": 512})
    write_model(tmp_path / "base", config)
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-m", "tinyllama", "export", tmp_path / "base"]
    process = subprocess.Popen([*command, tmp_path / "there" / "a.gguf"], cwd=ROOT, stderr=-1)
    until = time.monotonic() + 60
    while not left_in(tmp_path / "there") and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert (process.returncode, message) == (130, b"interrupted\n")
    assert left_in(tmp_path / "there") == []
