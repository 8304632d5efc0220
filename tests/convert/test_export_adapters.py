"""Adapters for other programs: PEFT, llama.cpp and mlx-lm, alone, with their base, or merged."""

import json
import math

import numpy as np
import pytest
from export_helpers import CONFIG, fields_of, gguf_name, relative, tensors_of, write_model
from gguf_helpers import to_pairs
from gguf_helpers import write_gguf as write_random_gguf
from lora_helpers import load_packed
from test_merge import write_adapter

from tinyllama.convert import export_adapter as module
from tinyllama.convert.export import Job, export
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.gguf import GgufFile
from tinyllama.formats.huggingface import HfFolder, linear_shapes_by_path, open_folder
from tinyllama.formats.peft import AdapterConfig, AdapterFolder, Placement, save_adapter
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.model.layers import block_linears
from tinyllama.runtime.storage import read

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "base"
    write_model(folder)
    return folder


def uneven(folder, base):
    """An adapter whose layers have ranks and scales of their own, on one layer of the two."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    shapes = linear_shapes_by_path(HfFolder(base).config)
    placed = {
        "model.layers.1.self_attn.q_proj": Placement(2, 8.0),
        "model.layers.1.self_attn.v_proj": Placement(4, 4.0),
    }
    tensors = {}
    for path, place in placed.items():
        for part, shape in (
            ("lora_A", (place.rank, shapes[path][1])),
            ("lora_B", (shapes[path][0], place.rank)),
        ):
            tensors[f"{path}.{part}.weight"] = rng.standard_normal(shape).astype(np.float32)
    save_adapter(folder, AdapterConfig(placed, base=str(base)), tensors, layers=shapes)
    return folder, AdapterConfig(placed), tensors


def deltas(config, tensors):
    """scale B A of each path, in Hugging Face's order."""
    return {
        path: config.scale(path)
        * (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"])
        for path in config.placed
    }


def gguf_deltas(path, config):
    """alpha / rank B A of each path of a GGUF adapter, as llama.cpp computes it; q and k in its
    order of rows."""
    stored, alpha = tensors_of(path), fields_of(path)["adapter.lora.alpha"]
    found = {}
    for name in config.placed:
        a, b = (stored[f"{gguf_name(f'{name}.weight')}.lora_{part}"][1] for part in "ab")
        found[name] = alpha / len(a) * (b @ a)
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"uneven": True}])
def test_a_gguf_adapter_computes_what_pefts_does(base, tmp_path, options):
    if options.pop("uneven", False):
        folder, config, tensors = uneven(tmp_path / "a", base)
    else:
        folder, config, tensors = write_adapter(tmp_path / "a", base, LINEARS, rank=4, **options)
    done = export(Job(folder, tmp_path / "out", "gguf"))
    path = tmp_path / "out" / "adapter.gguf"
    fields = fields_of(path)
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    found = gguf_deltas(path, config)
    assert len(tensors_of(path)) == 2 * len(config.placed)
    for name, delta in deltas(config, tensors).items():
        heads = HEADS.get(name.rpartition(".")[2])
        expected = delta if heads is None else to_pairs(delta, heads)
        assert relative(found[name], expected) < 1e-6, name
    assert done.check.relative < 1e-6
    assert "ADAPTER ./adapter.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_alpha_of_rslora_is_alpha_times_the_root_of_the_rank(base, tmp_path):
    folder, _, tensors = write_adapter(tmp_path / "a", base, rank=4, alpha=6.0, use_rslora=True)
    export(Job(folder, tmp_path / "a.gguf", "gguf"))
    assert fields_of(tmp_path / "a.gguf")["adapter.lora.alpha"] == 6.0 * math.sqrt(4)
    stored = tensors_of(tmp_path / "a.gguf")
    name = "model.layers.0.self_attn.v_proj"
    assert np.array_equal(stored["blk.0.attn_v.weight.lora_b"][1], tensors[f"{name}.lora_B.weight"])
    assert (tmp_path / "Modelfile").is_file()


@pytest.mark.parametrize("kind", ["even", "uneven"])
def test_an_mlx_adapter_has_mlx_lms_names_and_shapes(base, tmp_path, kind):
    """mlx_lm/tuner/utils.py: linear_to_lora_layers and load_adapters."""
    if kind == "even":
        folder, config, tensors = write_adapter(tmp_path / "a", base, LINEARS, rank=4)
    else:
        folder, config, tensors = uneven(tmp_path / "a", base)
    export(Job(folder, tmp_path / "out", "mlx"))
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parameters = values["lora_parameters"]
    keys = {"even": LINEARS, "uneven": ("q_proj", "v_proj")}[kind]
    part = {name: "mlp" if name in LINEARS[4:] else "self_attn" for name in LINEARS}
    assert values["fine_tune_type"] == "lora"
    assert values["num_layers"] == {"even": 2, "uneven": 1}[kind]
    assert parameters["keys"] == sorted(f"{part[name]}.{name}" for name in keys)
    assert (parameters["rank"], parameters["dropout"]) == (4, 0.0)
    assert parameters["scale"] == {"even": 1.5, "uneven": 4.0}[kind]
    file = SafetensorsFile(tmp_path / "out" / "adapters.safetensors")
    shapes = linear_shapes_by_path(CONFIG)
    assert len(file.names) == 2 * len(config.placed)
    for path, delta in deltas(config, tensors).items():
        a, b = file.float32(f"{path}.lora_a"), file.float32(f"{path}.lora_b")
        out, into = shapes[path]
        assert a.shape == (into, 4) and b.shape == (4, out)
        assert relative((parameters["scale"] * (a @ b)).T, delta) < 1e-6, path


def test_a_peft_adapter_keeps_what_it_was_and_gets_its_type(base, tmp_path):
    folder, config, _ = write_adapter(tmp_path / "a", base, rank=4, use_rslora=True)
    export(Job(folder, tmp_path / "out", "hf", "BF16"))
    written = AdapterFolder(tmp_path / "out")
    stored = SafetensorsFile(tmp_path / "out" / "adapter_model.safetensors")
    assert {stored.dtype(name) for name in stored.names} == {"BF16"}
    again = written.config(CONFIG)
    assert (again.placed, again.use_rslora) == (config.placed, True)
    assert written.base_folder() == base.resolve()


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_merged_is_base_and_adapter_in_one(base, tmp_path, target):
    folder, config, tensors = write_adapter(tmp_path / "a", base, LINEARS)
    done = export(Job(folder, tmp_path / "out", target, merged=True))
    place = tmp_path / "out"
    opened = open_folder(place) if target == "hf" else GgufFile(place / "model.gguf")
    own, added = open_folder(base), deltas(config, tensors)
    for name in own.names:
        expected = own.float32(name) + added.get(name.removesuffix(".weight"), np.float32(0))
        assert relative(opened.float32(name), expected) < 1e-6, name
    assert done.check.relative < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def with_a_head_of_its_own(folder, base):
    """An adapter that also holds lm_head as a whole, and matrices of the embedding."""
    folder, _, tensors = write_adapter(folder, base, rank=2)
    rng = np.random.default_rng(9)
    (rows, width), named = (CONFIG.vocab_size, CONFIG.hidden_size), {}
    named = {f"base_model.model.{name}": values for name, values in tensors.items()}
    table = "base_model.model.model.embed_tokens"
    for name, shape in (
        ("base_model.model.lm_head.weight", (rows, width)),
        (f"{table}.lora_embedding_A", (2, rows)),
        (f"{table}.lora_embedding_B", (width, 2)),
    ):
        named[name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", named)
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    values["target_modules"] = [*values["target_modules"], "embed_tokens"]
    file.write_text(json.dumps(values | {"modules_to_save": ["lm_head"]}))
    a, b = named[f"{table}.lora_embedding_A"], named[f"{table}.lora_embedding_B"]
    return folder, named["base_model.model.lm_head.weight"], 3.0 * (a.T @ b.T)


def test_what_an_adapter_changes_beyond_layers_is_merged_or_refused(base, tmp_path):
    folder, head, delta = with_a_head_of_its_own(tmp_path / "a", base)
    for target in ("gguf", "mlx", "hf"):
        with pytest.raises(ConfigError, match=r"changes lm_head\.weight, model\.embed_tokens, and"):
            export(Job(folder, tmp_path / "out", target))
    export(Job(folder, tmp_path / "a.gguf", "gguf", merged=True))
    opened, own = GgufFile(tmp_path / "a.gguf"), open_folder(base)
    assert np.array_equal(opened.float32("lm_head.weight"), head)
    table = "model.embed_tokens.weight"
    assert relative(opened.float32(table), own.float32(table) + delta) < 1e-6


@pytest.mark.parametrize("block_size", [32, 64])
def test_a_qlora_base_is_written_as_it_was_trained_on(base, tmp_path, block_size):
    folder, config, _ = write_adapter(tmp_path / "a", base, LINEARS, rank=4, block_size=block_size)
    done = export(Job(folder, tmp_path / "out", "gguf", with_base=True))
    assert done.check.largest == 0
    packed = load_packed(base, block_size)
    stored = tensors_of(tmp_path / "out" / "model.gguf")
    for path, owner, name in block_linears(packed.model.layers):
        kind, values = stored[gguf_name(f"{path}.weight")]
        dense = getattr(owner, name).dense_weight().numpy()
        heads = HEADS.get(name)
        assert kind == "Q4_0"
        assert np.array_equal(values, dense if heads is None else to_pairs(dense, heads)), path
    for name, ours in (("token_embd", packed.model.embed_tokens), ("output", packed.lm_head)):
        kind, values = stored[f"{name}.weight"]
        bits = read(ours.weight).astype(np.uint32) << 16
        assert kind == "BF16" and np.array_equal(values, bits.view(np.float32))
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\n")
    assert gguf_deltas(tmp_path / "out" / "adapter.gguf", config).keys() == config.placed.keys()


def test_a_base_that_q4_0_cannot_hold_is_refused(base, tmp_path):
    folder, *_ = write_adapter(tmp_path / "a", base, block_size=16)
    with pytest.raises(ConfigError, match=r"block_size 16.*multiples of 32.*type --merged"):
        export(Job(folder, tmp_path / "out", "gguf", with_base=True))
    assert not (tmp_path / "out").exists()


def test_blocks_of_a_gguf_base_stay_as_they_were_trained_on(tmp_path):
    source = tmp_path / "base.gguf"
    write_random_gguf(source, "Q4_1")
    opened = GgufFile(source)
    config = AdapterConfig(
        {"model.layers.0.self_attn.q_proj": Placement(2, 4.0)}, base=str(source), block_size=16
    )
    rng = np.random.default_rng(1)
    tensors = {
        f"model.layers.0.self_attn.q_proj.{part}.weight": rng.standard_normal(shape, np.float32)
        for part, shape in (("lora_A", (2, 256)), ("lora_B", (256, 2)))
    }
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", config, tensors, layers=linear_shapes_by_path(opened.config))
    export(Job(tmp_path / "a", tmp_path / "out", "gguf", with_base=True))
    written = GgufFile(tmp_path / "out" / "model.gguf")
    for name in opened.names:
        if name != "model.embed_tokens.weight":
            assert written.stored(name).tobytes() == opened.stored(name).tobytes(), name


def test_an_adapter_that_reads_back_wrong_leaves_nothing(base, tmp_path, monkeypatch):
    folder, *_ = write_adapter(tmp_path / "a", base)
    monkeypatch.setattr(module, "adapter_fields", lambda name, alpha: wrong(name, 2 * alpha))
    from tinyllama.formats.gguf_writer import adapter_fields as wrong

    with pytest.raises(WeightsError, match="differs from its source"):
        export(Job(folder, tmp_path / "out", "gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_options_of_adapters_that_do_not_fit_are_refused(base, tmp_path):
    folder, *_ = write_adapter(tmp_path / "a", base)
    for job, problem in (
        (Job(folder, tmp_path / "o", "gguf", "Q8_0"), "for an adapter alone: type --with-base"),
        (Job(folder, tmp_path / "o", "hf", with_base=True), "--with-base: goes with --to gguf"),
        (Job(folder, tmp_path / "o.gguf", "gguf", with_base=True), "must be a folder"),
    ):
        with pytest.raises(ConfigError, match=problem):
            export(job)
