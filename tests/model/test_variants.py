"""Variants of the architecture: head_dim, biases, sliding window, rope scaling, in all that a model
does: forward, gradients, generation, adapters, 4 bits, counts, files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from lora_helpers import load_packed, placed_on, with_adapters, write_base
from model_helpers import (
    GROUPED,
    LENGTH,
    build,
    difference,
    on_device,
    random_batch,
    random_weights,
    reference_logits,
    reference_loss,
)
from tinygrad import Tensor

from tinyllama import Llama, LlamaConfig
from tinyllama.bench.benchmark import check_peer_computes
from tinyllama.config import RopeScaling, config_from_toml
from tinyllama.errors import ConfigError
from tinyllama.formats.huggingface import llama_shapes
from tinyllama.formats.models import open_model
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.build import build as build_run
from tinyllama.model.counts import attention_flops, folder_parameters, model_flops, parameters
from tinyllama.model.initialize import initialize
from tinyllama.ops import forms
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.memory_estimate import model_parameters
from tinyllama.train.prepare import made_with

VARIANTS = {
    "narrow heads": replace(GROUPED, head_size=6),
    "wide heads": replace(GROUPED, head_size=20),
    "all biases": replace(GROUPED, attention_bias=True, mlp_bias=True),
    "qkv biases": replace(GROUPED, attention_bias="qkv", tie_word_embeddings=True),
    "window": replace(GROUPED, sliding_window=7),
    "window of one token": replace(GROUPED, sliding_window=1),
    "qkv biases and window": replace(GROUPED, attention_bias="qkv", sliding_window=11),
}


@pytest.mark.parametrize("form", ["cpu", "portable"])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_logits_equal_the_formula(name, form):
    config = VARIANTS[name]
    weights, batch = random_weights(config), random_batch(config)
    with forms.forced(form):
        model = build(config, weights)
        tokens, targets, starts = on_device(batch)
        loss = StagedLoss(model).loss(tokens, targets, starts).item()
        logits = model(tokens).numpy()
    assert loss == pytest.approx(reference_loss(weights, config, batch), rel=1e-5)
    assert difference(logits, reference_logits(weights, config, batch.tokens)) < 1e-5


def gradients(config, form, checkpoint=False):
    with forms.forced(form):
        model = build(config)
        model.checkpoint_activations = checkpoint
        staged = StagedLoss(model, model.state_dict())
        _, grads = staged.gradients(*on_device(random_batch(config)))
        return {name: read(grad).copy() for name, grad in grads.items()}


@pytest.mark.parametrize("name", ["all biases", "qkv biases and window"])
def test_gradients_are_those_of_the_formula_and_of_every_form(name):
    """Along a random direction in all biases: (loss(w + e d) - loss(w - e d)) / 2 e, float64."""
    config, rng = VARIANTS[name], np.random.default_rng(3)
    found, weights = gradients(config, "cpu"), random_weights(config)
    assert found.keys() == llama_shapes(config).keys()
    way = {n: rng.standard_normal(w.shape) for n, w in weights.items() if n.endswith("bias")}

    def loss(step):
        moved = {n: w.astype(np.float64) + step * way.get(n, 0) for n, w in weights.items()}
        return reference_loss(moved, config, random_batch(config))

    expected = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert sum((found[n] * d).sum() for n, d in way.items()) == pytest.approx(expected, rel=1e-4)
    largest = max(np.abs(grad).max() for grad in found.values())
    for other in (gradients(config, "portable"), gradients(config, "cpu", checkpoint=True)):
        for n, grad in found.items():
            assert difference(other[n], grad, floor=1e-3 * largest) < 1e-4, n


@pytest.mark.parametrize("name", ["wide heads", "all biases", "qkv biases and window"])
def test_tokens_generated_with_a_cache_are_those_of_the_formula(name):
    config = VARIANTS[name]
    weights = random_weights(config)
    prompt = random_batch(config).tokens[0, :9].tolist()
    made = list(Generator(build(config, weights)).tokens(prompt, 20, Sampling(temperature=0)))
    scores = reference_logits(weights, config, np.array([prompt + made]))[0, 8:-1]
    assert scores.argmax(-1).tolist() == made


def test_a_window_as_long_as_the_row_changes_nothing():
    batch = on_device(random_batch(GROUPED))
    plain, wide = (
        StagedLoss(build(replace(GROUPED, sliding_window=w))).loss(*batch).item()
        for w in (None, LENGTH)
    )
    assert plain == wide


def test_dynamic_scaling_in_generation_is_by_the_context_not_by_its_padding():
    """A context of 40 in slots of 64: the longest row has 40 positions, and 44 were trained."""
    scaling = RopeScaling("dynamic", 4.0, 44)
    config = replace(GROUPED, rope_scaling=scaling)
    prompt = random_batch(config).tokens[0, :9].tolist()
    made, plain = (
        list(Generator(build(c), 40).tokens(prompt, 20, Sampling(temperature=0)))
        for c in (config, GROUPED)
    )
    assert made == plain


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_by_formula_are_those_of_the_tensors(name, tmp_path):
    config = VARIANTS[name]
    model = Llama(config, seed=None)
    assert model.count_parameters() == parameters(config).total
    assert model_parameters(config_from_toml("", "t").__class__(model=config)) == parameters(config)
    folder = write_base(tmp_path / "m", config)
    assert folder_parameters(folder) == parameters(config)
    assert open_model(folder).config == replace(config, num_kv_heads=2)
    biases = {n: s for n, s in llama_shapes(config).items() if n.endswith(".bias")}
    assert len(biases) == 2 * len(config.biased)
    saved = model_flops(config, 10, 5) - model_flops(replace(config, mlp_bias=False), 10, 5)
    assert saved == 0


def test_operations_of_attention_follow_head_dim_and_window():
    config = replace(GROUPED, head_size=20)
    assert attention_flops(config, 66, 33) == 6 * 2 * (4 * 20) * 33 * 66
    # Twice the pairs of a window: each of 33 queries sees 7 keys, but the first ones fewer.
    window = attention_flops(replace(config, sliding_window=7), 66, 33)
    assert window == 6 * 2 * 80 * 7 * (2 * 33 - 7) * 2


def test_new_biases_are_zero_and_new_norms_one():
    config = VARIANTS["all biases"]
    model = Llama(config, seed=None)
    initialize(model.state_dict(), config.num_layers, 0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            assert (read(tensor) == (0 if name.endswith(".bias") else 1)).all(), name


def test_a_packed_base_keeps_its_biases_exactly(tmp_path):
    config = LlamaConfig(**{**VARIANTS["all biases"].__dict__, "intermediate_size": 96})
    folder = write_base(tmp_path / "m", config)
    packed, weights = load_packed(folder, 16), random_weights(config)
    state = packed.state_dict()
    held = {}
    for name, values in weights.items():
        path, _, part = name.rpartition(".")
        if part == "bias":
            assert (read(state[name]) == values).all(), name
        if f"{path}.packed" in state and part == "weight":
            layer = packed
            for step in path.split("."):
                layer = layer[int(step)] if step.isdigit() else getattr(layer, step)
            held[name] = layer.dense_weight().numpy()
        else:
            held[name] = state[name].float().numpy()
    tokens = random_batch(config).tokens
    found = packed(Tensor(tokens).realize()).numpy()
    assert difference(found, reference_logits(held, config, tokens)) < 1e-5


def test_adapters_on_layers_with_biases_add_to_what_those_compute():
    config = VARIANTS["all biases"]
    weights, batch = random_weights(config), random_batch(config)
    model = build(config, weights)
    with_adapters(model, placed_on(model, ("q_proj", "down_proj")))
    merged = dict(weights)
    for i in range(config.num_layers):
        for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            layer = getattr(getattr(model.model.layers[i], part), name)
            delta = layer.scale * read(layer.lora_B.weight) @ read(layer.lora_A.weight)
            merged[f"model.layers.{i}.{part}.{name}.weight"] = (
                weights[f"model.layers.{i}.{part}.{name}.weight"] + delta
            )
    found = model(Tensor(batch.tokens).realize()).numpy()
    assert difference(found, reference_logits(merged, config, batch.tokens)) < 1e-5
    trained = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    loss, grads = StagedLoss(model, trained).gradients(*on_device(batch))
    assert grads.keys() == trained.keys()
    assert loss.item() == pytest.approx(reference_loss(merged, config, batch), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "kind", "keys"),
    [
        (GROUPED, "llama", {"attention_bias": False, "mlp_bias": False, "head_dim": 12}),
        (VARIANTS["window"], "mistral", {"sliding_window": 7}),
        (VARIANTS["all biases"], "llama", {"attention_bias": True, "mlp_bias": True}),
        (VARIANTS["qkv biases"], "qwen2", {"use_sliding_window": False, "max_window_layers": 2}),
        (
            VARIANTS["qkv biases and window"],
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0},
        ),
        (
            replace(GROUPED, attention_bias="qkv", mlp_bias=True),
            "seed_oss",
            {"attention_bias": True, "attention_out_bias": False, "mlp_bias": True},
        ),
    ],
)  # fmt: skip
def test_a_saved_folder_names_a_model_type_that_computes_it(config, kind, keys, tmp_path):
    Llama(config).save_pretrained(tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == kind
    assert written.items() >= keys.items()
    assert open_model(tmp_path / "m").config == replace(config, num_kv_heads=2)


def test_what_a_run_was_made_with_is_compared_with_its_scaling():
    """A checkpoint's state holds plain values, by which a resumed run knows another scaling."""
    scaling = RopeScaling("yarn", 4.0, 64)
    config = config_from_toml("", "t")
    plain = made_with(config)
    scaled = made_with(replace(config, model=replace(config.model, rope_scaling=scaling)))
    assert json.loads(json.dumps(scaled)) == scaled
    assert all(isinstance(v, bool | int | float | str | list | None) for v in scaled.values())
    assert {key for key in plain if plain[key] != scaled[key]} == {"model.rope_scaling"}


def test_the_torch_peer_refuses_what_it_does_not_compute():
    check_peer_computes(GROUPED)
    for config in VARIANTS.values():
        with pytest.raises(ConfigError, match=r"^--peer: the peer computes no head_dim"):
            check_peer_computes(config)


def test_what_no_format_holds_is_refused():
    with pytest.raises(ConfigError, match="sliding_window: got 3, must be not set where"):
        replace(GROUPED, sliding_window=3, mlp_bias=True)
    with pytest.raises(ConfigError, match="head_dim: got 7, must be an integer of 2 or more"):
        replace(GROUPED, head_size=7)
    with pytest.raises(ConfigError, match='attention_bias: got "all", must be true or false or'):
        replace(GROUPED, attention_bias="all")


def test_a_base_may_be_given_another_scaling_and_a_run_resumes_with_it(tmp_path):
    """The length of its first training is the base's, whatever max_seq_len the run has."""
    base = write_base(tmp_path / "base", replace(GROUPED, vocab_size=300))
    text = f'[model]\nbase = "{base}"\nmax_seq_len = 256\n'
    text += '[model.rope_scaling]\nrope_type = "yarn"\nfactor = 4.0\n'
    config = config_from_toml(text, "t")
    opened = open_model(base)
    config = config.with_base(opened.config, "base")
    assert config.model.scaling == RopeScaling("yarn", 4.0, 64)
    assert "rope_scaling" in "".join(config.overridden(opened.config, "base"))
    assert config_from_toml(config.to_toml(), "again") == config
    model = build_run(config).model
    model.save_pretrained(tmp_path / "saved")
    assert build_run(config, tmp_path / "saved").model.config.scaling == config.model.scaling
    plain = config_from_toml(text, "t", ["model.rope_scaling=none"])
    assert plain.with_base(opened.config, "base").model.scaling is None
