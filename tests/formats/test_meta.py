"""Meta's layout beside Hugging Face's folder of the same weights, whole and cut for devices."""

import json
from dataclasses import replace

import numpy as np
import pytest
from lora_helpers import randomize
from model_helpers import GROUPED, difference, random_batch, random_weights
from tinygrad import Tensor

from tinyllama import Llama
from tinyllama.config import RopeScaling, config_from_toml
from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import save_folder
from tinyllama.formats.models import open_model
from tinyllama.formats.safetensors import write_safetensors
from tinyllama.model.build import build, load_model
from tinyllama.model.counts import folder_parameters
from tinyllama.model.lora import write_adapter

CONFIG = replace(GROUPED, max_seq_len=4096, rope_theta=10000.0, rms_norm_eps=1e-5)
PARAMS = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
PARAMS |= {"multiple_of": 8, "vocab_size": -1}
NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def in_meta_order(weight, heads):
    """The inverse of what the reader does, by index: row 2i of a head is row i, 2i + 1 is i + D/2.

    So Meta's code rotates (2i, 2i + 1) by the angle by which Hugging Face's rotates (i, i + D/2).
    """
    D = weight.shape[0] // heads
    rows = np.empty_like(weight)
    for head in range(heads):
        for i in range(D // 2):
            rows[head * D + 2 * i] = weight[head * D + i]
            rows[head * D + 2 * i + 1] = weight[head * D + i + D // 2]
    return rows


def meta_weights(config, seed=0):
    """Random weights under Meta's names, each with the axis along which devices cut it."""
    found = {}
    for name, values in random_weights(config, seed).items():
        if name.startswith("model.layers."):
            _, _, number, path = name.removesuffix(".weight").split(".", 3)
            theirs = f"layers.{number}.{NAMES[path]}.weight"
            axis = None if values.ndim == 1 else int(path.endswith(("o_proj", "down_proj")))
        else:
            theirs, axis = {
                "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
                "model.norm.weight": ("norm.weight", None),
                "lm_head.weight": ("output.weight", 0),
            }[name]
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.kv_heads)):
            if f"{part}.weight" in name:
                values = in_meta_order(values, heads)
        found[theirs] = (values, axis)
    return found


def write_meta(folder, config=CONFIG, parts=1, params=PARAMS, embedding_axis=1, seed=0, extra=()):
    folder.mkdir()
    tensors = meta_weights(config, seed)
    tensors["tok_embeddings.weight"] = (tensors["tok_embeddings.weight"][0], embedding_axis)
    for number in range(parts):
        held = {
            name: values if axis is None else np.split(values, parts, axis)[number]
            for name, (values, axis) in tensors.items()
        }
        name = (
            "consolidated.safetensors" if parts == 1 else f"consolidated.{number:02d}.safetensors"
        )
        write_safetensors(folder / name, held | dict(extra))
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(
    ("parts", "embedding_axis"), [(1, 1), (2, 1), (2, 0)], ids=["whole", "2", "2 of Llama 3"]
)
def test_a_folder_gives_the_logits_of_hugging_faces(parts, embedding_axis, tmp_path):
    config = replace(CONFIG, vocab_size=132)
    rope = {"rope.freqs": np.zeros(6, np.float32)}
    write_meta(tmp_path / "meta", config, parts, embedding_axis=embedding_axis, extra=rope)
    opened = open_model(tmp_path / "meta")
    assert opened.config == config
    expected = random_weights(config)
    assert set(opened.names) == set(expected)
    for name, values in expected.items():
        assert opened.shape(name) == values.shape, name
        assert (opened.float32(name) == values).all(), name
        assert (opened.source(name).load().data == values).all(), name
    save_folder(tmp_path / "hf", config, expected, dtype="float32", files={}, bos_id=1, eos_id=2)
    tokens = Tensor(random_batch(config).tokens).realize()
    ours, theirs = (Llama.from_pretrained(tmp_path / f)(tokens).numpy() for f in ("meta", "hf"))
    assert (ours == theirs).all()
    assert folder_parameters(tmp_path / "meta").total == sum(v.size for v in expected.values())


def test_adapters_are_trained_on_it_loaded_and_merged(tmp_path):
    folder = write_meta(tmp_path / "meta", replace(CONFIG, vocab_size=132), 2)
    config = config_from_toml("", "t", [f"model.base={folder}", "lora.rank=2"])
    config = config.with_base(open_model(folder).config, "base")
    built = build(config)
    randomize(built.model)
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", built.model, built.adapter)
    tokens = Tensor(random_batch(GROUPED).tokens).realize()
    expected = built.model(tokens).numpy()
    np.testing.assert_allclose(load_model(tmp_path / "a")(tokens).numpy(), expected, atol=1e-5)
    merge(folder, [(tmp_path / "a", 1.0)], tmp_path / "out")
    merged = Llama.from_pretrained(tmp_path / "out")(tokens).numpy()
    assert difference(merged, expected) < 1e-4
    (folder / "consolidated.01.safetensors").unlink()
    write_meta(tmp_path / "other", replace(CONFIG, vocab_size=132), 2, seed=7)
    with pytest.raises(WeightsError, match="was made for another base"):
        load_model(tmp_path / "a", base=tmp_path / "other")


@pytest.mark.parametrize(
    ("params", "changes"),
    [
        ({"norm_eps": 1e-6}, {"max_seq_len": 2048, "rms_norm_eps": 1e-6}),
        ({"rope_theta": 500000.0}, {"max_seq_len": 8192, "rope_theta": 500000.0}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            {
                "max_seq_len": 131072,
                "rope_theta": 500000.0,
                "rope_scaling": RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
            },
        ),
        (
            {"use_scaled_rope": True, "rope_scaling_factor": 8, "max_seq_len": 777},
            {"max_seq_len": 777, "rope_scaling": RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)},
        ),
        ({"sliding_window": 5, "head_dim": 12, "hidden_dim": 72}, {"sliding_window": 5}),
    ],
    ids=["LLaMA 1", "Llama 3", "Llama 3.2", "stated", "Mistral"],
)
def test_params_of_each_release(params, changes, tmp_path):
    write_meta(tmp_path / "meta", params=PARAMS | params)
    assert open_model(tmp_path / "meta").config == replace(CONFIG, **changes)


def test_a_tied_head_and_heads_of_another_width(tmp_path):
    config = replace(CONFIG, tie_word_embeddings=True, head_size=8)
    write_meta(tmp_path / "meta", config, params=PARAMS | {"head_dim": 8})
    assert open_model(tmp_path / "meta").config == config


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_layers": 10**9}, "params.json: n_layers: got 1000000000, but the files hold 21"),
        ({"n_layers": "2"}, "params.json: n_layers: expected int, got str"),
        ({"n_layers": 1}, "layers.1.attention.wk.weight: extra, no such parameter"),
        ({"n_heads": 8}, "self_attn.k_proj.weight: shape"),
        ({"n_heads": 7}, "params.json: model.hidden_size: got 48, must be divisible by"),
        ({"dim": None}, "params.json: dim: expected int, got null"),
        ({"moe": {"num_experts": 8}}, "params.json: moe: a mixture of experts cannot be computed"),
        ({"norm_eps": float("nan")}, "rms_norm_eps: got nan, must be a finite number"),
    ],
)  # fmt: skip
def test_params_that_do_not_fit_are_refused(params, message, tmp_path):
    write_meta(tmp_path / "meta", params=PARAMS | params)
    with pytest.raises((ConfigError, WeightsError), match=message):
        open_model(tmp_path / "meta")


def test_pickles_and_parts_that_differ_are_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", replace(CONFIG, vocab_size=132), parts=2)
    write_safetensors(folder / "consolidated.01.safetensors", {"norm.weight": np.ones(48, np.int8)})
    with pytest.raises(WeightsError) as caught:
        open_model(folder)
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert any("consolidated.01.safetensors: norm.weight: not as in" in line for line in lines)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "consolidated.00.pth").write_bytes(b"\x80\x02")
    with pytest.raises(
        WeightsError, match=r"holds consolidated.00.pth, a pickle, which can run co"
    ):
        open_model(folder)


def test_rows_are_those_of_llama_in_both_orders():
    """Rotating pairs (2i, 2i + 1) of Meta's rows gives what rotating (i, i + D/2) of ours does."""
    from tinyllama.formats.meta import half_rotation

    rng = np.random.default_rng(0)
    x, theirs = rng.standard_normal(48), rng.standard_normal((2 * 12, 48))
    ours = half_rotation(theirs, 2)
    angles = 3.0 * 10000.0 ** (-2 * np.arange(6) / 12)
    q = (theirs @ x).reshape(2, 6, 2)
    turned = (q[..., 0] + 1j * q[..., 1]) * np.exp(1j * angles)
    p = (ours @ x).reshape(2, 2, 6)
    half = (p[:, 0] + 1j * p[:, 1]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, half)
