"""Merging adapters into a copy of their base: values, files, types, refusals, memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from lora_helpers import BASE, write_base
from model_helpers import difference, random_batch
from runs_helpers import left_behind
from tinygrad import Tensor

from tinyllama.config import ALL_LINEAR
from tinyllama.convert.merge import merge, parse_adapter
from tinyllama.errors import CheckpointError, ConfigError, WeightsError
from tinyllama.formats.dtypes import to_bfloat16
from tinyllama.formats.huggingface import HfFolder, linear_shapes_by_path, open_folder
from tinyllama.formats.peft import (
    ADAPTER_WEIGHTS,
    AdapterConfig,
    Placement,
    _sampled_fingerprint,
    fingerprint,
    save_adapter,
)
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.model.build import load_model
from tinyllama.model.llama import Llama
from tinyllama.train.manifest import write_manifest

ROOT = Path(__file__).resolve().parents[2]
QV = ("q_proj", "v_proj")


def write_adapter(folder, base, names=QV, rank=3, alpha=6.0, seed=1, known=True, **options):
    """A PEFT folder with random A and B on the layers with these names."""
    folder.mkdir()
    opened, rng = HfFolder(base), np.random.default_rng(seed)
    shapes = {p: s for p, s in linear_shapes_by_path(opened.config).items() if p.endswith(names)}
    placed = dict.fromkeys(shapes, Placement(rank, alpha))
    sum_of = fingerprint(opened) if known else None
    config = AdapterConfig(placed, base=str(base), base_fingerprint=sum_of, **options)
    tensors = {}
    for path, (out, into) in shapes.items():
        for part, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
            values = 0.3 * rng.standard_normal(shape)
            tensors[f"{path}.{part}.weight"] = values.astype(np.float32)
    save_adapter(folder, config, tensors, layers=linear_shapes_by_path(opened.config))
    return folder, config, tensors


def weights_of(folder):
    opened = open_folder(folder)
    return {name: np.array(opened.float32(name)) for name in opened.names}


def expected_weights(base, *added):
    """In float64: W + sum of weight * scale * B A."""
    weights = {name: w.astype(np.float64) for name, w in weights_of(base).items()}
    for config, tensors, weight in added:
        for path in config.placed:
            a, b = (tensors[f"{path}.{part}.weight"] for part in ("lora_A", "lora_B"))
            weights[f"{path}.weight"] += weight * config.scale(path) * b.astype(np.float64) @ a
    return weights


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_are_the_formula_and_the_rest_keeps_its_bits(base, tmp_path, use_rslora):
    adapter, config, tensors = write_adapter(tmp_path / "a", base, use_rslora=use_rslora)
    done = merge(base, [(adapter, 1.0)], tmp_path / "out")
    found, expected = weights_of(tmp_path / "out"), expected_weights(base, (config, tensors, 1.0))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert difference(found[name], values) < 1e-6, name
        if not name.removesuffix(".weight").endswith(QV):
            assert (found[name] == weights_of(base)[name]).all(), name
    weights_bytes = 4 * sum(w.size for w in found.values())
    assert (done.changed, done.total, done.bytes) == (4, len(found), weights_bytes)


def test_merged_logits_equal_those_with_the_adapter_on(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, names=ALL_LINEAR)
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    tokens = Tensor(random_batch(BASE).tokens).realize()
    merged = Llama.from_pretrained(tmp_path / "out")(tokens).numpy()
    on, off = load_model(adapter)(tokens).numpy(), Llama.from_pretrained(base)(tokens).numpy()
    assert difference(merged, on) < 1e-5 and difference(off, on) > 1e-2


def test_several_adapters_are_added_with_their_weights(base, tmp_path):
    one = write_adapter(tmp_path / "a", base)
    two = write_adapter(tmp_path / "b", base, names=("v_proj", "up_proj"), rank=5, seed=2)
    merge(base, [(one[0], 0.5), (two[0], -0.25)], tmp_path / "out")
    expected = expected_weights(base, (*one[1:], 0.5), (*two[1:], -0.25))
    for name, values in weights_of(tmp_path / "out").items():
        assert difference(values, expected[name]) < 1e-6, name


def test_unmerge_restores_the_base(base, tmp_path):
    adapters = [(write_adapter(tmp_path / "a", base)[0], 0.5)]
    merge(base, adapters, tmp_path / "merged")
    merge(tmp_path / "merged", adapters, tmp_path / "again", unmerge=True)
    before, merged = weights_of(base), weights_of(tmp_path / "merged")
    for name, values in weights_of(tmp_path / "again").items():
        assert np.abs(values - before[name]).max() < 1e-6, name
    assert any((merged[name] != before[name]).any() for name in before)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("bfloat16", "keep", "BF16"),
        ("bfloat16", "fp32", "F32"),
        ("float32", "bf16", "BF16"),
        ("float16", "keep", "F16"),
    ],
)
def test_types_are_kept_or_those_asked_for(tmp_path, stored, asked, expected):
    base = write_base(tmp_path / "base", dtype=stored)
    adapter, config, tensors = write_adapter(tmp_path / "a", base)
    merge(base, [(adapter, 1.0)], tmp_path / "out", dtype=asked)
    out, exact = open_folder(tmp_path / "out"), expected_weights(base, (config, tensors, 1.0))
    assert {out.dtype(name) for name in out.names} == {expected}
    error = {"F32": 1e-6, "F16": 2**-11, "BF16": 2**-8}[expected]  # rounded once, to nearest
    for name, values in exact.items():
        limit = error * np.maximum(np.abs(values), 2.0**-14) + 1e-6 * np.abs(values).max()
        assert (np.abs(out.float32(name) - values) <= limit).all(), name
    if expected == "BF16":
        name = "model.layers.0.self_attn.q_proj.weight"
        best = to_bfloat16(exact[name].astype(np.float32))
        assert (out.array(name) != best).mean() < 0.01  # but for ties within float32's rounding
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert {said["dtype"], said["torch_dtype"]} == {names[expected]}


def test_shards_index_and_all_other_files_are_the_bases(tmp_path):
    base = write_base(tmp_path / "base", max_shard_bytes=20_000)
    (base / "LICENSE").write_text("as you like")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "training_state.json").write_text("{}")
    (base / "optimizer.safetensors").write_bytes(b"")
    adapter, *_ = write_adapter(tmp_path / "a", base)
    out = tmp_path / "out"
    merge(base, [(adapter, 1.0)], out)
    left = {"training_state.json", "optimizer.safetensors"}
    names = {path.name for path in base.iterdir()} - left
    made = {"tokenizer.json", "tokenizer_config.json"}  # of the base's tokenizer.model
    assert {path.name for path in out.iterdir()} == names | made
    assert len(list(out.glob("model-*.safetensors"))) > 2
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    for name in names:
        if "safetensors" not in name:
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert HfFolder(out).files == HfFolder(base).files


def test_the_base_and_the_adapter_are_not_touched(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    files = [*base.iterdir(), *adapter.iterdir()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def refused(kind, base, adapters, out, **options):
    """The message of a merge that must fail and leave nothing."""
    there = sorted(out.parent.iterdir())
    with pytest.raises(kind) as caught:
        merge(base, adapters, out, **options)
    assert sorted(out.parent.iterdir()) == there
    return str(caught.value)


def test_the_base_itself_and_folders_that_exist_are_refused_as_output(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "taken").mkdir()
    for out in (base, tmp_path / "link"):
        message = refused(WeightsError, base, [(adapter, 1.0)], out)
        assert message == f"{out}: is the base itself, which is never written to"
    message = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "taken")
    assert message == f"{tmp_path / 'taken'}: exists already: name a new folder"


def test_a_rank_that_lies_is_refused_by_every_tensor(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    edit_config(adapter, r=4)
    lines = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "out").split("\n")
    assert len(lines) == 8
    assert lines[0] == (
        f"{adapter}/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj."
        "lora_A.weight: shape (3, 32), must be (4, 32), as the base and rank 4 have it"
    )


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    """By its fingerprint; without one by the base it names, if that is here; else by shapes."""
    other = write_base(tmp_path / "other", seed=5)
    adapter, *_ = write_adapter(tmp_path / "a", base)
    message = refused(WeightsError, other, [(adapter, 1.0)], tmp_path / "out")
    assert message.startswith(f"{adapter}: was made for another base ({base}, fingerprint ")
    assert f") than {other} (fingerprint " in message
    unknown, *_ = write_adapter(tmp_path / "b", base, known=False)
    assert "another base" in refused(WeightsError, other, [(unknown, 1.0)], tmp_path / "out")
    edit_config(unknown, base_model_name_or_path="somebody/llama")
    wide = type(BASE)(**{**BASE.__dict__, "hidden_size": 48})
    wider = write_base(tmp_path / "wider", wide)
    message = refused(WeightsError, wider, [(unknown, 1.0)], tmp_path / "out")
    assert "q_proj.lora_A.weight: shape (3, 32), must be (3, 48), as the base" in message
    assert merge(other, [(unknown, 1.0)], tmp_path / "out").changed == 4


def test_a_base_whose_tied_head_is_stored_twice_is_the_base_that_an_adapter_names(tmp_path):
    """By a name relative to the adapter's folder, without a fingerprint, as PEFT leaves it."""
    tied = type(BASE)(**{**BASE.__dict__, "tie_word_embeddings": True})
    base = write_base(tmp_path / "base", tied)
    file = base / "model.safetensors"
    tensors = {name: np.array(a) for name, a in weights_of(base).items()}
    file.unlink()
    write_safetensors(file, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    adapter, *_ = write_adapter(tmp_path / "a", base, known=False)
    edit_config(adapter, base_model_name_or_path="../base")
    assert merge(base, [(adapter, 1.0)], tmp_path / "out").changed == 4
    other = write_base(tmp_path / "other", tied, seed=5)
    assert "another base" in refused(WeightsError, other, [(adapter, 1.0)], tmp_path / "no")


def test_an_adapter_with_a_value_that_is_not_finite_is_refused_by_name(base, tmp_path):
    adapter, config, tensors = write_adapter(tmp_path / "a", base)
    name = next(iter(tensors))
    tensors[name][1, 2] = np.nan
    (adapter / "adapter_model.safetensors").unlink()
    save_adapter(adapter, config, tensors, layers=linear_shapes_by_path(open_folder(base).config))
    message = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "out")
    assert message.endswith(f"base_model.model.{name}: holds a value that is not finite")


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_checkpoint_with_a_flipped_bit_is_not_merged(base, tmp_path, place):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    folder, name = (base, "model.safetensors") if place == "base" else (adapter, ADAPTER_WEIGHTS)
    write_manifest(folder, {})
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    message = refused(CheckpointError, base, [(adapter, 1.0)], tmp_path / "out", unmerge=True)
    assert f"{folder / name}: changed" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", range(4))
def test_a_base_that_differs_in_any_byte_is_another_base(base, tmp_path, part):
    """Earlier versions looked at 3 x 1024 values of each tensor."""
    file = base / "model.safetensors"
    name = "model.embed_tokens.weight"
    adapter, *_ = write_adapter(tmp_path / "a", base)
    was = open_folder(base).array(name).copy()
    info = SafetensorsFile(file).tensors[name]
    data = bytearray(file.read_bytes())
    data[info.offset + part * (info.size_bytes - 1) // 3] ^= 1
    file.write_bytes(data)
    assert (open_folder(base).array(name) != was).sum() == 1
    message = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "out")
    assert message.startswith(f"{adapter}: was made for another base ")


def test_an_adapter_with_a_fingerprint_of_an_earlier_version_is_compared_by_that(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    file = adapter / ADAPTER_WEIGHTS
    stored = SafetensorsFile(file)
    tensors = {name: stored.source(name) for name in stored.names}
    sampled = _sampled_fingerprint(open_folder(base))
    assert re.fullmatch("[0-9a-f]{64}", sampled)
    metadata = stored.metadata | {"base_fingerprint": sampled}
    write_safetensors(tmp_path / "new", tensors, metadata)
    (tmp_path / "new").rename(file)
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    other = write_base(tmp_path / "other", seed=9)
    message = refused(WeightsError, other, [(adapter, 1.0)], tmp_path / "out2")
    assert message.startswith(f"{adapter}: was made for another base ")


def test_what_a_killed_merge_left_is_removed_by_the_next(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    left = left_behind(tmp_path, "out")
    left.mkdir()
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not left.exists()


def test_missing_and_extra_tensors_are_refused_by_name(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    edit_config(adapter, target_modules=["q_proj", "k_proj"])
    message = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "out")
    assert "layers.1.self_attn.k_proj.lora_B.weight: missing" in message
    assert "layers.1.self_attn.v_proj.lora_A.weight: extra, no adapter goes there" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias": "all"}, "bias: got 'all', must be 'none': nothing else is supported"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', must be 'LORA': nothing else is supported"),
        ({"use_dora": True}, "use_dora: got True, must be absent or empty: it is not supported"),
        ({"lora_bias": True}, "lora_bias: got True, must be absent or empty"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: got True, must be absent or empty"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: got [[0, 1]], must be absent"),
        ({"of_next_year": 3}, "of_next_year: got 3, must be absent or empty"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', must be True"),
        ({"r": 0}, "r: got 0, must be an integer above 0"),
        ({"r": 3.5}, "r: got 3.5, must be an integer above 0"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8', must be a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, must be a finite number above 0"),
        ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern.q_proj: got '3', must be an integer"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: got '(', must be a regular expression"),
        ({"target_modules": "*q"}, "target_modules: got '*q', must be a regular expression or"),
        ({"target_modules": None}, "target_modules: got None, must name linear layers"),
        ({"layers_pattern": "h"}, "layers_pattern: got 'h', must be 'layers'"),
        ({"target_modules": ["c_attn"]}, "target_modules: got ['c_attn'], must name linear layers"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "layers_to_transform: must be absent where target_modules is one expression",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused_by_name(base, tmp_path, changes, expected):
    adapter, *_ = write_adapter(tmp_path / "a", base)
    edit_config(adapter, **changes)
    message = refused(ConfigError, base, [(adapter, 1.0)], tmp_path / "out")
    assert message.startswith(f"{adapter}/adapter_config.json: {expected}")


def test_a_merge_that_fails_half_way_leaves_nothing(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, alpha=1e9)
    message = refused(WeightsError, base, [(adapter, 1.0)], tmp_path / "out", dtype="fp16")
    assert "q_proj.weight: " in message and message.endswith(" is too large for F16")


def test_adapters_are_named_with_or_without_a_weight(tmp_path):
    (tmp_path / "c:0.5").mkdir()
    assert parse_adapter("some/a") == (Path("some/a"), 1.0)
    assert parse_adapter("some/a:0.25") == (Path("some/a"), 0.25)
    assert parse_adapter("some/a:-1") == (Path("some/a"), -1.0)
    assert parse_adapter("C:\\a") == (Path("C:\\a"), 1.0)
    assert parse_adapter(f"{tmp_path}/c:0.5") == (tmp_path / "c:0.5", 1.0)
    with pytest.raises(WeightsError, match=r"^--adapter a:nan: weight: got nan, must be a finite"):
        parse_adapter("a:nan")


def script(*words):
    command = [sys.executable, "tools/merge.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_script_merges_and_tells_mistakes_in_one_line(base, tmp_path):
    one, *_ = write_adapter(tmp_path / "a", base)
    two, *_ = write_adapter(tmp_path / "b", base, seed=2)
    words = ["--base", base, "--adapter", f"{one}:0.5", "--adapter", two, "--out", tmp_path / "out"]
    done = script(*words, "--dtype", "bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 4 of 21 tensors changed, ")
    merge(base, [(one, 0.5), (two, 1.0)], tmp_path / "again", dtype="bf16")
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    again = script(*words)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"merge: {tmp_path / 'out'}: exists already: name a new folder\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("names", "options"),
    [(QV, [{}]), (ALL_LINEAR, [{"block_size": 64}, {"block_size": 64, "seed": 2}])],
    ids=["two layers a block", "two adapters on all, in 4 bits"],
)
def test_merging_needs_the_memory_of_a_few_tensors_and_not_of_the_model(tmp_path, names, options):
    """A base of 270 MB in bfloat16; in 4 bits every matrix of it is held in float32, twice."""
    config = type(BASE)(
        vocab_size=8192,
        hidden_size=1024,
        num_layers=12,
        num_heads=8,
        intermediate_size=2048,
        max_seq_len=64,
    )
    base = tmp_path / "base"
    write_base(base, type(BASE)(**{**config.__dict__, "num_layers": 1}), dtype="bfloat16")
    grow_layers(base, config.num_layers)
    adapters = [
        write_adapter(tmp_path / f"a{number}", base, tuple(names), rank=64, **asked)[0]
        for number, asked in enumerate(options)
    ]
    # VmHWM is this program's own peak; ru_maxrss begins with that of the process that started it.
    code = """
        import sys
        from tinyllama.convert.merge import merge

        def peak_bytes():
            with open("/proc/self/status") as status:
                return 1024 * next(int(x.split()[1]) for x in status if x.startswith("VmHWM"))

        before = peak_bytes()
        done = merge(sys.argv[1], [(path, 1.0) for path in sys.argv[3:]], sys.argv[2])
        print(done.bytes, peak_bytes() - before)
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        *map(str, (base, tmp_path / "out", *adapters)),
    ]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    weights_bytes, peak_bytes = map(int, done.stdout.split())
    largest_bytes = 2 * 8192 * 1024
    assert weights_bytes > 200e6 and peak_bytes < (8 if "block_size" in options[0] else 4) * (
        largest_bytes
    )
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(base)


def grow_layers(base, layers):
    """Give a folder more layers, as shards that are copies of the first layer's."""
    opened = HfFolder(base)
    first = [name for name in opened.names if ".layers.0." in name]
    shards = {
        "model-rest.safetensors": {n: opened.source(n) for n in opened.names if n not in first}
    }
    for number in range(layers):
        names = {name.replace(".layers.0.", f".layers.{number}."): name for name in first}
        shards[f"model-{number}.safetensors"] = {n: opened.source(names[n]) for n in names}
    for file, tensors in shards.items():
        write_safetensors(base / file, tensors)
    (base / "model.safetensors").unlink()
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(found | {"num_hidden_layers": layers}))


@pytest.mark.parametrize("name", ["LICENSE", "notes.txt", "chat_template.jinja", "NOTICE.md"])
def test_a_link_out_of_the_base_is_not_copied(base, tmp_path, name):
    """It may lead to any file of this user, and the copy is given to others."""
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    adapter = write_adapter(tmp_path / "a", base)[0]
    (base / name).symlink_to(secret)
    with pytest.raises(WeightsError, match=f"{name}: is a link out of its folder"):
        merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_base_or_its_place_in_a_hubs_cache_is_copied(base, tmp_path):
    cache = tmp_path / "models--owner--name"
    folder = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (folder / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (folder / "words.txt").write_text("words")
    (folder / "LICENSE").symlink_to("words.txt")
    adapter = write_adapter(tmp_path / "a", base)[0]
    merge(folder, [(adapter, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "words"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
