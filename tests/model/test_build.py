"""Models as they are built: new, resumed, without memory, at random, from folders."""

import re
from dataclasses import replace

import numpy as np
import pytest
from lora_helpers import BASE, placed_on, randomize, with_adapters, write_base
from model_helpers import build as model_of
from model_helpers import random_weights
from tinygrad import dtypes

from tinyllama.config import Config, LoraConfig, QloraConfig, TrainingConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.peft import AdapterConfig, Placement, fingerprint
from tinyllama.model.build import (
    build,
    build_blank,
    build_random,
    load_model,
    tokenizer_folder,
)
from tinyllama.model.int4 import Int4Linear
from tinyllama.model.layers import named_tensors
from tinyllama.model.llama import Llama
from tinyllama.model.lora import adapter_tensors, attach, lora_layers, write_adapter
from tinyllama.ops import matmul
from tinyllama.runtime.storage import read
from tinyllama.system import device
from tinyllama.tokenizers.files import MODEL_FILE

REQUESTED = LoraConfig(
    rank=4, alpha=10.0, dropout=0.25, target_modules=("q_proj", "up_proj"), use_rslora=True
)


def configured(base, seed=5, lora=REQUESTED, **training):
    """A configuration that trains adapters on a base."""
    return Config(
        model=replace(BASE, base=str(base)),
        training=TrainingConfig(seed=seed, **training),
        lora=lora,
    )


def base_tensors(model):
    """The tensors that are not adapters', by the names they have without them."""
    own = {f"{path}.dropout_key" for path in lora_layers(model)} | adapter_tensors(model).keys()
    return {name: tensor for name, tensor in named_tensors(model) if name not in own}


def copied(tensors):
    return {name: read(tensor).copy() for name, tensor in tensors.items()}


def same(some, others):
    return some.keys() == others.keys() and all((some[n] == others[n]).all() for n in some)


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """A saved checkpoint of the adapters that REQUESTED describes, with numbers in them."""
    model, _, config = build(configured(base))
    randomize(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, model, config)
    return folder, copied(adapter_tensors(model))


def test_new_adapters_are_what_the_section_asks_for(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    model, trained, config = build(configured(base.relative_to(base.parent)))
    assert config == AdapterConfig(
        placed_on(model, ("q_proj", "up_proj"), 4, 10.0), True, 0.25, str(base),
        fingerprint(open_folder(base)),
    )  # fmt: skip
    layers = lora_layers(model)
    assert copied(trained).keys() == copied(adapter_tensors(model)).keys()
    assert same(copied(base_tensors(model)), random_weights(BASE, 0))
    assert layers.keys() == config.placed.keys() and len(layers) == 2 * BASE.num_layers
    assert {(x.scale, x.dropout) for x in layers.values()} == {(10 / 2, 0.25)}  # sqrt 4


def test_new_adapters_come_from_the_seed(base):
    def begun(seed):
        return copied(build(configured(base, seed)).trained)

    reference = model_of(BASE)
    attach(reference, AdapterConfig(placed_on(reference, ("q_proj", "up_proj"), 4)), 5)
    assert same(begun(5), copied(adapter_tensors(reference)))
    assert not same(begun(5), begun(6))


def test_resumed_adapters_are_those_of_the_checkpoint(base, adapter):
    folder, saved = adapter
    assert same(copied(build(configured(base), folder).trained), saved)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 5},
        {"alpha": 9.0},
        {"use_rslora": False},
        {"target_modules": ("q_proj",)},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_a_checkpoint_with_other_adapters_is_refused_by_what_it_has(base, adapter, options):
    other = LoraConfig(
        **{"rank": 4, "alpha": 10.0, "target_modules": ("q_proj", "up_proj"), "use_rslora": True}
        | options
    )
    with pytest.raises(ConfigError) as caught:
        build(configured(base, lora=other), adapter[0])
    saved = "rank 4, alpha 10, use_rslora on q_proj, up_proj is saved there"
    assert str(caught.value) == f"[lora] differs from {adapter[0]}: {saved}"


def test_a_checkpoint_of_another_base_is_refused(adapter, tmp_path):
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(WeightsError, match="was made for another base"):
        build(configured(other), adapter[0])


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.bfloat16], ids=str)
def test_a_folder_with_a_model_or_an_adapter_loads_as_a_model(base, adapter, dtype):
    folder, saved = adapter
    plain, adapted = load_model(base, dtype=dtype), load_model(folder, dtype=dtype)
    assert lora_layers(plain) == {} and plain.dtype == adapted.dtype == dtype
    assert same(copied(plain.state_dict()), random_weights(BASE, 0))
    assert same(copied(base_tensors(adapted)), random_weights(BASE, 0))
    assert same(copied(adapter_tensors(adapted)), saved)
    assert {x.scale for x in lora_layers(adapted).values()} == {5.0}
    assert load_model(base).dtype == dtypes.float32


def test_an_adapter_is_put_on_the_base_that_is_named_instead(base, adapter, tmp_path):
    folder, saved = adapter
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        WeightsError,
        match=r"must be the folder of the base model; if that has moved, type --base FOLDER",
    ):
        load_model(folder)
    model = load_model(folder, base=moved)
    assert same(copied(base_tensors(model)), random_weights(BASE, 0))
    assert same(copied(adapter_tensors(model)), saved)
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(WeightsError, match="was made for another base"):
        load_model(folder, base=other)
    with pytest.raises(ConfigError, match=f"^--base: got {moved}, must be left out: {moved} holds"):
        load_model(moved, base=moved)


def test_a_packed_base_without_memory_or_at_random_has_the_tensors_of_a_run(base):
    """What the memory estimate counts and the benchmark runs is what training allocates."""
    config = replace(configured(base, dtype="bfloat16"), qlora=QloraConfig(block_size=16))
    run = build(config)
    assert isinstance(lora_layers(run.model)["model.layers.0.self_attn.q_proj"].base, Int4Linear)
    assert run.adapter.block_size == 16
    for other in (build_blank(config), build_random(config, 3)):
        shapes, expected = (
            [(name, t.shape, t.dtype) for name, t in named_tensors(built.model)]
            for built in (other, run)
        )
        assert shapes == expected
        assert other.trained.keys() == run.trained.keys()
        assert other.model.dtype == run.model.dtype == dtypes.bfloat16
        assert other.adapter.placed == run.adapter.placed


def test_a_model_without_a_base_is_new_and_trained_whole(tmp_path):
    config = Config(model=BASE, training=TrainingConfig(seed=4, checkpoint_activations=True))
    model, trained, adapter = build(config)
    assert adapter is None and model.checkpoint_activations
    assert same(copied(trained), copied(Llama(BASE, seed=4).state_dict()))
    assert trained.keys() == model.state_dict().keys()
    assert same(copied(build_random(config, 4).trained), copied(trained))


@pytest.mark.parametrize("instructions", ["AVX-512-BF16", "AVX2"])
def test_products_of_bfloat16_parts_are_refused_where_they_are_slower(instructions, monkeypatch):
    monkeypatch.setattr(device, "instruction_set", lambda: instructions)
    config = Config(model=BASE, training=TrainingConfig(float32_products="bfloat16x3"))
    said = f'training.float32_products: got "bfloat16x3", must be "exact" on {instructions}: '
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_blank(config)


def test_products_of_bfloat16_parts_are_offered_with_amx(monkeypatch):
    monkeypatch.setattr(device, "instruction_set", lambda: "AMX")
    model, _, _ = build_blank(
        Config(model=BASE, training=TrainingConfig(float32_products="bfloat16x3"))
    )
    assert model.float32_products == "bfloat16x3"
    assert build_blank(Config(model=BASE)).model.float32_products == "exact"
    sizes = matmul.NT, 64, 32, 32, dtypes.float32, dtypes.float32, dtypes.float32
    assert "BF16X3" not in matmul.gemm_macros(*sizes)[0]
    with matmul.float32_products(model.float32_products):
        assert "BF16X3" in matmul.gemm_macros(*sizes)[0]


def test_an_adapter_has_the_tokenizer_of_its_base_unless_it_has_its_own(base, adapter):
    folder, _ = adapter
    assert (base / MODEL_FILE).is_file()
    assert tokenizer_folder(base) == base
    assert tokenizer_folder(folder) == base
    assert tokenizer_folder(folder, base.parent / "moved") == base.parent / "moved"
    (folder / MODEL_FILE).write_bytes((base / MODEL_FILE).read_bytes())
    assert tokenizer_folder(folder) == folder


def test_the_first_matrix_is_uniform_from_the_least_to_the_largest(tmp_path):
    """Between -1 / sqrt(in) and 1 / sqrt(in), as float32, (rank, in)."""
    model = model_of(BASE)
    with_adapters(model, {})  # nothing is placed, nothing is wrapped
    assert adapter_tensors(model) == {}
    path = "model.layers.0.mlp.down_proj"
    attach(model, AdapterConfig({path: Placement(64, 1.0)}), 3)
    values = read(lora_layers(model)[path].lora_A.weight)
    bound = 1 / np.sqrt(BASE.intermediate_size)
    assert values.shape == (64, BASE.intermediate_size) and values.dtype == np.float32
    assert -bound <= values.min() < -0.99 * bound and 0.99 * bound < values.max() <= bound
