"""Hugging Face folders: what is written is read again, and what is wrong has a name."""

import hashlib
import json

import numpy as np
import pytest

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import RawArray, to_bfloat16
from tinyllama.formats.huggingface import (
    check_names,
    llama_shapes,
    open_folder,
    save_folder,
    weights_bytes,
)
from tinyllama.formats.model_config import config_from_hf, config_to_hf
from tinyllama.formats.safetensors import LazyArray, SafetensorsFile, write_safetensors

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=40,
    max_seq_len=64,
    rope_theta=500.0,
    rms_norm_eps=1e-6,
)
TIED = LlamaConfig(
    vocab_size=20,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    tie_word_embeddings=True,
)


def random_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in llama_shapes(config).items()
    }


def save(folder, config=CONFIG, tensors=None, **options):
    options = {"dtype": "float32", "files": {}, "bos_id": 1, "eos_id": 2} | options
    tensors = random_tensors(config) if tensors is None else tensors
    return save_folder(folder, config, tensors, **options)


def edit_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_folder_opens_with_the_same_model(tmp_path, config, dtype):
    tensors = random_tensors(config)
    digests = save(tmp_path / "m", config, tensors, dtype=dtype, eos_id=[2, 7])
    opened = open_folder(tmp_path / "m")
    assert opened.config.__dict__ | {"num_kv_heads": config.num_kv_heads} == config.__dict__
    assert (opened.bos_id, opened.eos_ids) == (1, (2, 7))
    assert set(opened.names) == set(tensors)
    for name, array in tensors.items():
        if dtype == "bfloat16":
            np.testing.assert_array_equal(opened.array(name), to_bfloat16(array))
        else:
            np.testing.assert_array_equal(opened.array(name), array.astype(dtype))
        assert opened.float32(name).dtype == np.float32
    for name, digest in digests.items():
        data = (tmp_path / "m" / name).read_bytes()
        assert digest == (hashlib.sha256(data).hexdigest(), len(data))
    assert set(digests) == {path.name for path in (tmp_path / "m").iterdir()}
    size = sum(array.size for array in tensors.values()) * (4 if dtype == "float32" else 2)
    assert weights_bytes(config, dtype) == size


def test_shapes_follow_grouped_query_attention():
    shapes = llama_shapes(CONFIG)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (24, 24)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (12, 24)
    assert shapes["model.layers.1.self_attn.v_proj.weight"] == (12, 24)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (24, 40)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (40, 24)
    assert shapes["lm_head.weight"] == (50, 24)
    assert len(shapes) == 3 + 2 * 9
    assert "lm_head.weight" not in llama_shapes(TIED)
    count = sum(int(np.prod(shape)) for shape in llama_shapes(LlamaConfig.llama2_7b()).values())
    assert count == 6_738_415_616


def test_shards_hold_every_tensor_once_and_stay_below_the_limit(tmp_path):
    tensors = random_tensors(CONFIG)
    digests = save(tmp_path, tensors=tensors, max_shard_bytes=8_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == weights_bytes(CONFIG, "float32")
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert set(shards) < set(digests)
    held = {shard: SafetensorsFile(tmp_path / shard) for shard in shards}
    assert sorted(name for file in held.values() for name in file.names) == sorted(tensors)
    for file in held.values():
        assert sum(info.size_bytes for info in file.tensors.values()) <= 8_000
        assert file.metadata == {"format": "pt"}
    opened = open_folder(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(opened.array(name), array)


def test_tensor_larger_than_a_shard_has_its_own(tmp_path):
    save(tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00021.safetensors"))) == 21
    open_folder(tmp_path)


def test_each_lazy_source_is_loaded_once_and_any_float_is_accepted(tmp_path):
    tensors = random_tensors(TIED)
    asked = []

    def lazy(name, array):
        def load():
            asked.append(name)
            return array

        return load

    sources = {name: lazy(name, array) for name, array in tensors.items()}
    norm = tensors["model.norm.weight"]
    sources["model.norm.weight"] = RawArray("BF16", norm.shape, to_bfloat16(norm))
    query = "model.layers.0.self_attn.q_proj.weight"
    sources[query] = LazyArray("F16", (8, 8), lambda: tensors[query].astype(np.float16))
    save(tmp_path, TIED, sources)
    assert sorted(asked) == sorted(tensors.keys() - {"model.norm.weight", query})
    opened = open_folder(tmp_path)
    assert {opened.dtype(name) for name in opened.names} == {"F32"}
    np.testing.assert_array_equal(opened.array(query), tensors[query].astype(np.float16))
    again = tmp_path / "again"
    save(again, TIED, {name: opened.source(name) for name in opened.names})
    assert (again / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_tokenizer_files_are_written_byte_for_byte(tmp_path):
    files = {"tokenizer.model": b"\0", "tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
    files["generation_config.json"] = b'{"temperature": 0.6}'
    save(tmp_path / "a", files=files)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files} == files
    save(tmp_path / "b", eos_id=(2, 3))
    assert json.loads((tmp_path / "b/generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert json.loads((tmp_path / "b/config.json").read_text())["eos_token_id"] == [2, 3]


def test_config_json_has_both_forms_of_what_transformers_renamed():
    found = config_to_hf(CONFIG, 1, [2, 3], "bfloat16")
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["rope_theta"] == 500.0
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert (found["dtype"], found["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (found["num_key_value_heads"], found["head_dim"]) == (2, 6)
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, [2, 3])
    assert found["hidden_act"] == "silu"
    assert found["max_position_embeddings"] == 64
    assert found["rms_norm_eps"] == 1e-6


LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def test_absent_fields_mean_what_transformers_says():
    config = config_from_hf(LLAMA2, "config.json")
    assert config == LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        intermediate_size=11008,
        max_seq_len=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
    )


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500000.0}, "rope_theta": 500000, "rope_scaling": None},
        {"rope_scaling": {"type": "default"}, "rope_theta": 500000.0},
    ],
)
def test_rope_theta_is_read_from_either_form(form):
    assert config_from_hf(LLAMA2 | form, "config.json").rope_theta == 500000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type: got 'gemma', must be one of 'llama', 'mistral'"),
        ({"model_type": None}, "model_type: got None, must be one of 'llama', 'mistral'"),
        ({"model_type": ["llama"]}, r"model_type: got \['llama'\], must be one of"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', must be 'silu'"),
        ({"attention_bias": "some"}, 'attention_bias: got "some", must be true or false'),
        ({"mlp_bias": 1}, "mlp_bias: got 1, must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got .*, must be absent"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "got 'longrope', cannot be computed",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor: expected float >= 1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: expected float, got str"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "contains unknown field x"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "rope_scaling: .*must be one with low_freq_factor and a larger high_freq_factor",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters: got \[1\], must be an object"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 4},
            },
            "rope_parameters, rope_scaling: contradict each other",
        ),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, r"one for each of \['full'\]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, must be 1.0"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradict each other"),
        ({"head_dim": 65}, "head_dim: got 65, must be an integer of 2 or more and a multiple of 2"),
        ({"num_attention_heads": None}, "num_attention_heads: missing"),
        ({"num_attention_heads": 33}, "4096"),
        ({"vocab_size": "many"}, "many"),
        ({"rope_theta": "x"}, "rope_theta"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=f"^there/config.json: .*{message}"):
        config_from_hf(LLAMA2 | changes, "there/config.json")


def test_every_problem_of_a_config_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        config_from_hf({"model_type": "llama", "hidden_act": "gelu", "vocab_size": 5}, "c")
    assert len(str(error.value).split("\n")) == 5


def test_missing_extra_misshapen_and_wrong_types_are_all_named():
    expected = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}
    found = {"b": ("F32", (5,)), "c": ("I8", (1,)), "d": ("BF16", (5,)), "e": ("F32", (1,))}
    with pytest.raises(WeightsError) as error:
        check_names(expected, found, "here")
    assert str(error.value).split("\n") == [
        "here: a: missing",
        "here: b: shape (5,), must be (4,)",
        "here: c: type I8, must be one of F32, BF16, F16",
        "here: e: extra, no such parameter",
    ]
    check_names({"d": (5,)}, {"d": ("BF16", (5,))}, "here")


def test_save_refuses_wrong_tensors_before_it_writes(tmp_path):
    tensors = random_tensors(CONFIG)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    with pytest.raises(WeightsError) as error:
        save(tmp_path / "m", tensors=tensors)
    assert str(error.value).split("\n") == [
        f"{tmp_path}/m: lm_head.weight: shape (24, 50), must be (50, 24)",
        f"{tmp_path}/m: model.norm.weight: missing",
    ]
    assert not (tmp_path / "m").exists()


def test_callable_that_gives_another_shape_is_named(tmp_path):
    tensors = random_tensors(CONFIG) | {"model.norm.weight": lambda: np.zeros(3, np.float32)}
    with pytest.raises(WeightsError, match=r"model.norm.weight: shape \(3,\), must be \(24,\)"):
        save(tmp_path, tensors=tensors)


@pytest.mark.parametrize("name", ["config.json", "../x", "a/b", "", "adapter.safetensors", ".."])
def test_tokenizer_file_with_a_taken_or_foreign_name_is_refused(tmp_path, name):
    with pytest.raises(WeightsError, match="cannot be the name of a tokenizer file"):
        save(tmp_path, files={name: b""})


def test_folder_that_holds_weights_is_not_mixed_with_others(tmp_path):
    save(tmp_path, max_shard_bytes=8_000)
    with pytest.raises(WeightsError, match=r"holds model-00001-of-\d+.safetensors already"):
        save(tmp_path)


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="dtype: got 'int8', must be one of float32, bfloat16"):
        save(tmp_path, dtype="int8")


def test_opening_names_the_tensor_that_does_not_fit_the_config(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, vocab_size=51)
    with pytest.raises(WeightsError) as error:
        open_folder(tmp_path)
    assert str(error.value).split("\n") == [
        f"{tmp_path}: lm_head.weight: shape (50, 24), must be (51, 24)",
        f"{tmp_path}: model.embed_tokens.weight: shape (50, 24), must be (51, 24)",
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, r"neither model.safetensors nor model.safetensors.index.json"),
        ({"adapter_model.safetensors": b""}, "holds an adapter"),
        ({"pytorch_model.bin": b""}, "holds pytorch_model.bin, a pickle, .* never read"),
    ],
)
def test_folder_without_weights_says_what_it_holds(tmp_path, extra, message):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, data in extra.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        open_folder(tmp_path)


def test_absent_folder_and_damaged_json_are_named(tmp_path):
    with pytest.raises(WeightsError, match="none: not a folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config.json: missing"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json: must be a JSON object"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("file", r"model-00002-of-\d+.safetensors: missing"),
        ("name", r"index.json: model.norm.weight: not in model-00001-of-\d+.safetensors"),
        ("path", r"index.json: weight_map: must map names to files of this folder"),
        ("forgotten", r"extra.weight: extra, no such parameter"),
    ],
)
def test_index_that_does_not_fit_its_shards_is_refused(tmp_path, damage, message):
    save(tmp_path, max_shard_bytes=8_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.embed_tokens.weight"]
    if damage == "file":
        next(tmp_path.glob("model-00002*")).unlink()
    elif damage == "name":
        index["weight_map"]["model.norm.weight"] = first
    elif damage == "path":
        index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    else:
        file = SafetensorsFile(tmp_path / first)
        copy = {name: file.source(name) for name in file.names}
        write_safetensors(tmp_path / "new", copy | {"extra.weight": np.zeros(1, np.float32)})
        (tmp_path / "new").rename(tmp_path / first)
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        open_folder(tmp_path)


def rewrite(folder, changes):
    file = SafetensorsFile(folder / "model.safetensors")
    sources = {name: file.source(name) for name in file.names}
    write_safetensors(folder / "new", sources | changes)
    (folder / "new").rename(folder / "model.safetensors")


def test_tables_that_follow_from_the_config_are_left_out(tmp_path):
    save(tmp_path)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, {table: np.ones(3, np.float32)})
    assert table not in open_folder(tmp_path).names


def test_tied_head_stored_again_is_accepted_only_if_it_is_the_embedding(tmp_path):
    tensors = random_tensors(TIED)
    save(tmp_path, TIED, tensors)
    rewrite(tmp_path, {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "lm_head.weight" not in open_folder(tmp_path).names
    rewrite(tmp_path, {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(WeightsError, match=r"lm_head.weight: extra, no such parameter"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [5, 6]}, {}, (1, (5, 6))),
        ({"bos_token_id": 4, "eos_token_id": 5}, {}, (4, (5,))),
        (None, {"eos_token_id": [8]}, (1, (8,))),
        ({}, {"eos_token_id": None, "bos_token_id": None}, (None, ())),
    ],
)
def test_stop_tokens_come_from_the_generation_config_first(tmp_path, generation, config, ids):
    save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    edit_config(tmp_path, **config)
    opened = open_folder(tmp_path)
    assert (opened.bos_id, opened.eos_ids) == ids


def test_stop_tokens_that_are_no_integers_are_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(ConfigError, match=r"eos_token_id \['</s>'\]: must be integers"):
        open_folder(tmp_path)
