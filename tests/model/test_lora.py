"""Adapters: what they compute, their gradients, dropout, and what is frozen."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from lora_helpers import (
    load_packed,
    placed_on,
    randomize,
    with_adapters,
)
from model_helpers import (
    GROUPED,
    SQUARE,
    build,
    on_device,
    random_batch,
    random_weights,
    reference_loss,
)
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.config import (
    ALL_LINEAR,
    LoraConfig,
    TrainingConfig,
)
from tinyllama.formats.dtypes import to_bfloat16
from tinyllama.formats.huggingface import llama_shapes
from tinyllama.formats.int4 import as_packed
from tinyllama.formats.peft import AdapterConfig, AdapterFolder, Placement
from tinyllama.model.build import load_model
from tinyllama.model.layers import Linear
from tinyllama.model.lora import (
    LoRALinear,
    adapter_tensors,
    attach,
    dropping,
    lora_layers,
    random_bits,
    write_adapter,
)
from tinyllama.ops import forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

QV = ("q_proj", "v_proj")


# Enough for what a single layer decides: logits of whole models compile layer by layer.
ONE_LAYER = replace(SQUARE, num_layers=1)


def logits_of(model):
    return model(Tensor(random_batch(SQUARE).tokens).realize()).numpy()


def copied(tensors):
    return {name: read(tensor).copy() for name, tensor in tensors.items()}


def base_tensors(model):
    """The frozen tensors of a model."""
    adapters = adapter_tensors(model)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in adapters and not name.endswith("dropout_key")
    }


def merged_weights(weights, adapters, config):
    """W + scale B A in float64."""
    merged = dict(weights)
    for path in config.placed:
        a, b = (
            adapters[f"{path}.{part}.weight"].astype(np.float64) for part in ("lora_A", "lora_B")
        )
        merged[f"{path}.weight"] = weights[f"{path}.weight"] + config.scale(path) * b @ a
    return merged


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("cpu", dtypes.float32), ("cpu", dtypes.bfloat16), ("portable", dtypes.float32)],
    ids=["float32", "bfloat16", "portable"],
)
def test_new_adapters_leave_the_logits_bit_identical(form, dtype):
    with forms.forced(form):
        model = build(ONE_LAYER, dtype=dtype)
        before = logits_of(model)
        attach(model, AdapterConfig(placed_on(model, ALL_LINEAR)), seed=1)
        assert len(lora_layers(model)) == 7
        assert (logits_of(model) == before).all()
        randomize(model)
        assert (logits_of(model) != before).any()


def test_new_adapters_on_a_packed_base_leave_the_logits_bit_identical(tmp_path):
    model, _ = packed_model(tmp_path, ONE_LAYER, 8)
    before = logits_of(model)
    attach(model, AdapterConfig(placed_on(model, ALL_LINEAR)), seed=1)
    assert (logits_of(model) == before).all()


def packed_model(folder, config, block_size):
    """A model with random weights in 4 bits, and the weights that it stands for."""
    build(config).save_pretrained(folder / "base")
    weights = random_weights(config)
    for name, values in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = as_packed(name, values, block_size)
        elif values.ndim == 2:
            weights[name] = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    return load_packed(folder / "base", block_size), weights


@pytest.mark.parametrize("form", ["kept", "recomputed", "in 4 bits"])
def test_gradients_of_both_matrices_equal_finite_differences(form, tmp_path):
    """Layers with different ranks and scales: no layer may run with the numbers of another."""
    three = replace(GROUPED, num_layers=3)
    if form == "in 4 bits":
        model, weights = packed_model(tmp_path, three, 8)
    else:
        model, weights = build(three), random_weights(three)
    model.checkpoint_activations = form == "recomputed"
    placed = placed_on(model, ("q_proj", "k_proj", "down_proj"))
    placed["model.layers.0.self_attn.q_proj"] = Placement(3, 1.5)
    placed["model.layers.1.mlp.down_proj"] = Placement(3, 4.0)
    placed["model.layers.1.self_attn.k_proj"] = Placement(5, 6.0)
    placed["model.layers.2.self_attn.k_proj"] = Placement(5, 6.0)
    config = with_adapters(model, placed)
    batch = random_batch(GROUPED)
    loss, grads = StagedLoss(model, adapter_tensors(model)).gradients(*on_device(batch))
    adapters = {n: a.astype(np.float64) for n, a in copied(adapter_tensors(model)).items()}

    def loss_with(name, change):
        moved = adapters | {name: adapters[name] + change}
        return reference_loss(merged_weights(weights, moved, config), three, batch)

    assert loss.item() == pytest.approx(
        loss_with("model.layers.0.self_attn.q_proj.lora_A.weight", 0)
    )
    assert set(grads) == set(adapters)
    rng = np.random.default_rng(5)
    for name, gradient in copied(grads).items():
        direction = rng.standard_normal(gradient.shape)
        step = 1e-5 * direction
        expected = (loss_with(name, step) - loss_with(name, -step)) / 2e-5
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert (gradient * direction).sum() == pytest.approx(expected, abs=1e-5 * size), name


def products(stage):
    """How often each layout of cpu/gemm.c is run by a stage's templates, by part and layout.

    A kernel's name has its four sizes first, then the layout.
    """
    counts = {}
    for key, template in stage._templates.items():
        programs = [call.src[0] for call in template.kernels.src]
        names = [program.arg.name for program in programs if program.op is Ops.PROGRAM]
        words = [name.split("_") for name in names if name.startswith("gemm")]
        counts[key[0][0], key[0][-1]] = Counter(word[5] for word in words)
    return counts


def test_no_gradient_of_a_frozen_weight_is_computed():
    model = build(SQUARE)
    with_adapters(model, placed_on(model, QV))
    staged = StagedLoss(model, adapter_tensors(model))
    staged.gradients(*on_device(random_batch(SQUARE)))
    found = products(staged.stages.backward)
    transposed, plain = "2", "1"  # the layouts of dW and dx
    assert found["Block.__call__", True][transposed] == 2 * len(QV)
    assert found["Block.__call__", True][plain] == 7 + 2 * len(QV)
    # In the lowest layer that is trained, nothing is pulled back to what is below it: not through
    # q, k and v (3 products), not through their A (2).
    assert found["Block.__call__", False][transposed] == 2 * len(QV)
    assert found["Block.__call__", False][plain] == 4 + len(QV)
    assert not any("embed" in part for part, _ in found)


def test_layers_below_the_lowest_adapter_are_not_pulled_back():
    model = build(SQUARE)
    placed = placed_on(model, QV)
    upper = {path: place for path, place in placed.items() if ".layers.1." in path}
    with_adapters(model, upper)
    staged = StagedLoss(model, adapter_tensors(model))
    _, grads = staged.gradients(*on_device(random_batch(SQUARE)))
    assert set(grads) == set(adapter_tensors(model))
    assert [part for part, _ in products(staged.stages.backward)] == [
        "RMSNorm.__call__",
        "Block.__call__",
    ]


def test_base_and_adapter_tensors_have_the_names_of_their_files():
    model = build(SQUARE)
    attach(model, AdapterConfig(placed_on(model, QV)), seed=1)
    shapes = {name: t.shape for name, t in base_tensors(model).items()}
    assert shapes == llama_shapes(SQUARE)
    expected = {}
    for layer in range(SQUARE.num_layers):
        for name in QV:
            path = f"model.layers.{layer}.self_attn.{name}"
            expected |= {f"{path}.lora_A.weight": (3, 32), f"{path}.lora_B.weight": (32, 3)}
    assert {name: t.shape for name, t in adapter_tensors(model).items()} == expected


def test_any_layer_that_meets_the_contract_can_be_wrapped():
    class Doubling:
        in_features, out_features = 4, 4

        def __call__(self, x):
            return x * 2

        def dense_weight(self):
            return Tensor.eye(4) * 2

    layer = LoRALinear(Doubling(), 1, scale=3.0)
    write(layer.lora_A.weight, np.array([[1, 0, 0, 1]], np.float32))
    write(layer.lora_B.weight, np.array([[0], [1], [0], [2]], np.float32))
    x = Tensor([[1.0, 2, 3, 4]])
    assert layer(x).tolist() == [[2, 4 + 3 * 5, 6, 8 + 3 * 2 * 5]]
    assert (x @ layer.dense_weight().T).tolist() == layer(x).tolist()


def test_new_matrices_are_kaiming_uniform_from_seed_and_name_and_zero():
    def matrices(seed):
        model = build(SQUARE)
        attach(model, AdapterConfig(placed_on(model, QV, rank=16)), seed)
        return copied(adapter_tensors(model))

    first, again, other = matrices(7), matrices(7), matrices(8)
    bound = np.sqrt(6 / (1 + 5) / 32)  # fan in 32, a = sqrt 5
    a = {name: values for name, values in first.items() if "lora_A" in name}
    for name, values in a.items():
        assert np.abs(values).max() <= bound and np.abs(values).max() > 0.95 * bound
        assert abs(values.mean()) < 0.1 * bound
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.15)
        assert (values == again[name]).all() and (values != other[name]).any()
    assert len({values.tobytes() for values in a.values()}) == len(a)
    assert not any(values.any() for name, values in first.items() if "lora_B" in name)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    layer = LoRALinear(Linear(64, 8), 2, scale=1.0, dropout=0.25)
    write(layer.dropout_key, np.array([12345, 678], np.uint32))
    ones = Tensor.ones(64, 64)
    thinned = layer._thinned(ones).numpy()
    assert set(np.unique(thinned)) == {0.0, np.float32(1 / 0.75)}
    assert (thinned == 0).mean() == pytest.approx(0.25, abs=0.02)
    # Neither rows nor columns are alike, and the key decides.
    assert len({row.tobytes() for row in thinned}) == len({c.tobytes() for c in thinned.T}) == 64
    write(layer.dropout_key, np.array([12345, 679], np.uint32))
    assert ((layer._thinned(ones).numpy() == 0) & (thinned == 0)).mean() < 0.1


def test_random_bits_are_the_hash_that_the_docstring_names():
    def mixed(bits):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * factor % 2**32
        return bits ^ (bits >> 16)

    key = Tensor(np.array([3, 2**32 - 5], np.uint32)).realize()
    expected = [mixed(mixed(i ^ 3) ^ (2**32 - 5)) for i in range(9)]
    assert random_bits(key, 9).tolist() == expected


def test_dropout_is_on_in_training_alone_and_differs_by_step_layer_and_micro_batch():
    model = build(SQUARE)
    with_adapters(model, placed_on(model, QV), dropout=0.5)
    staged = StagedLoss(model, adapter_tensors(model))
    inputs, masks = on_device(random_batch(SQUARE)), dropping(model, seed=4)

    def training_loss(step, micro_batch):
        with masks(step, micro_batch):
            keys = {read(x.dropout_key).tobytes() for x in lora_layers(model).values()}
            assert len(keys) == 2 * SQUARE.num_layers
            return staged.gradients(*inputs)[0].item()

    whole = staged.loss(*inputs).item()
    losses = [training_loss(*at) for at in [(1, 0), (1, 1), (2, 0)]]
    assert len({whole, *losses}) == 4
    assert training_loss(1, 1) == losses[1]
    assert staged.loss(*inputs).item() == whole


def test_without_dropout_nothing_is_added():
    model = build(SQUARE)
    attach(model, AdapterConfig(placed_on(model, QV)), seed=1)
    with dropping(model, seed=4)(1, 0):
        assert not any(layer.drops for layer in lora_layers(model).values())
    assert not any(name.endswith("dropout_key") for name in model.state_dict())


def test_a_step_moves_adapters_and_leaves_the_base_alone():
    model = build(SQUARE)
    attach(model, AdapterConfig(placed_on(model, QV), dropout=0.5), seed=1)
    base, adapters = copied(base_tensors(model)), copied(adapter_tensors(model))
    optimizer = AdamW(adapter_tensors(model), TrainingConfig())
    step = TrainStep(model, optimizer, 1, dropping(model, seed=4))
    losses = [step([random_batch(SQUARE)], number, 1e-2).loss for number in (1, 2, 3, 4, 5)]
    assert losses[-1] < losses[0]
    assert all((read(t) == base[name]).all() for name, t in base_tensors(model).items())
    for name, tensor in adapter_tensors(model).items():
        assert (read(tensor) != adapters[name]).any(), name
    moments = {name.split(".", 1)[1] for name in optimizer.state_dict()}
    assert moments == adapters.keys()


def test_writing_and_loading_keeps_ranks_and_scales_of_single_layers(tmp_path):
    model = build(SQUARE)
    placed = placed_on(model, QV)
    placed["model.layers.1.self_attn.q_proj"] = Placement(5, 2.5)
    del placed["model.layers.0.self_attn.v_proj"]
    config = with_adapters(model, placed, use_rslora=True)
    write_adapter(tmp_path, model, config)
    build(SQUARE).save_pretrained(tmp_path / "base")
    found = AdapterFolder(tmp_path).config(SQUARE)
    again = load_model(tmp_path, base=tmp_path / "base")
    assert (found.placed, found.use_rslora) == (placed, True)
    assert found.scale("model.layers.1.self_attn.q_proj") == pytest.approx(2.5 / np.sqrt(5))
    for name, tensor in adapter_tensors(model).items():
        assert (read(adapter_tensors(again)[name]) == read(tensor)).all(), name
    assert LoraConfig(rank=5, alpha=2.5, use_rslora=True).scale == found.scale(
        "model.layers.1.self_attn.q_proj"
    )
