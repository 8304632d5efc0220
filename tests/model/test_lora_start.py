"""Adapters as a run begins with them: new or resumed, and models with adapters from folders."""

import numpy as np
import pytest
from lora_helpers import BASE, placed_on, randomize, with_adapters, write_base
from model_helpers import build, random_weights
from tinygrad import dtypes

from tinyllama.config import LoraConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.peft import AdapterConfig, Placement, fingerprint
from tinyllama.model.lora import (
    adapter_tensors,
    attach,
    base_tensors,
    load_model,
    lora_layers,
    start,
    tokenizer_folder,
    write_adapter,
)
from tinyllama.runtime.storage import read
from tinyllama.tokenizers.sentencepiece import MODEL_FILE

ASKED = LoraConfig(
    rank=4, alpha=10.0, dropout=0.25, target_modules=("q_proj", "up_proj"), use_rslora=True
)


def copied(tensors):
    return {name: read(tensor).copy() for name, tensor in tensors.items()}


def same(some, others):
    return some.keys() == others.keys() and all((some[n] == others[n]).all() for n in some)


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """A saved checkpoint of the adapters that ASKED asks for, with numbers in them."""
    model = build(BASE)
    config = start(model, ASKED, base, 5, None)
    randomize(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, model, config)
    return folder, copied(adapter_tensors(model))


def test_new_adapters_are_what_the_section_asks_for(base, monkeypatch):
    model = build(BASE)
    monkeypatch.chdir(base.parent)
    config = start(model, ASKED, base.relative_to(base.parent), 5, None)
    assert config == AdapterConfig(
        placed_on(model, ("q_proj", "up_proj"), 4, 10.0), True, 0.25, str(base),
        fingerprint(open_folder(base)),
    )  # fmt: skip
    layers = lora_layers(model)
    assert layers.keys() == config.placed.keys() and len(layers) == 2 * BASE.num_layers
    assert {(x.scale, x.dropout) for x in layers.values()} == {(10 / 2, 0.25)}  # sqrt 4


def test_new_adapters_come_from_the_seed(base):
    def begun(seed):
        model = build(BASE)
        start(model, ASKED, base, seed, None)
        return copied(adapter_tensors(model))

    reference = build(BASE)
    attach(reference, AdapterConfig(placed_on(reference, ("q_proj", "up_proj"), 4)), 5)
    assert same(begun(5), copied(adapter_tensors(reference)))
    assert not same(begun(5), begun(6))


def test_resumed_adapters_are_those_of_the_checkpoint(base, adapter):
    folder, saved = adapter
    model = build(BASE)
    start(model, ASKED, base, 5, folder)
    assert same(copied(adapter_tensors(model)), saved)


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
    asked = LoraConfig(
        **{"rank": 4, "alpha": 10.0, "target_modules": ("q_proj", "up_proj"), "use_rslora": True}
        | options
    )
    with pytest.raises(ConfigError) as caught:
        start(build(BASE), asked, base, 5, adapter[0])
    saved = "rank 4, alpha 10, use_rslora on q_proj, up_proj is saved there"
    assert str(caught.value) == f"[lora] differs from {adapter[0]}: {saved}"


def test_a_checkpoint_of_another_base_is_refused(adapter, tmp_path):
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(WeightsError, match="was made for another base"):
        start(build(BASE), ASKED, other, 5, adapter[0])


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


def test_an_adapter_has_the_tokenizer_of_its_base_unless_it_has_its_own(base, adapter):
    folder, _ = adapter
    assert (base / MODEL_FILE).is_file()
    assert tokenizer_folder(base) == base
    assert tokenizer_folder(folder) == base
    (folder / MODEL_FILE).write_bytes((base / MODEL_FILE).read_bytes())
    assert tokenizer_folder(folder) == folder


def test_the_first_matrix_is_uniform_from_the_least_to_the_largest(tmp_path):
    """Between -1 / sqrt(in) and 1 / sqrt(in), as float32, (rank, in)."""
    model = build(BASE)
    with_adapters(model, {})  # nothing is placed, nothing is wrapped
    assert adapter_tensors(model) == {}
    path = "model.layers.0.mlp.down_proj"
    attach(model, AdapterConfig({path: Placement(64, 1.0)}), 3)
    values = read(lora_layers(model)[path].lora_A.weight)
    bound = 1 / np.sqrt(BASE.intermediate_size)
    assert values.shape == (64, BASE.intermediate_size) and values.dtype == np.float32
    assert -bound <= values.min() < -0.99 * bound and 0.99 * bound < values.max() <= bound
