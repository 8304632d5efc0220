"""Models whose weights are blocks of a GGUF file: loaded, generated from, trained on, merged."""

from dataclasses import replace

import numpy as np
import pytest
from gguf_helpers import CONFIG, write_gguf
from model_helpers import on_device, random_batch
from tinygrad import Tensor, dtypes

from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model import int4
from tinyllama.model.build import load_model
from tinyllama.model.int4 import Int4Embedding, Int4Linear
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.ops import forms

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q6_K", "F16", "BF16", "F32")
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)


def held(model):
    """What the linear layers are: the form, or the type of the weight."""
    layers = [getattr(owner, name) for _, owner, name in block_linears(model.model.layers)]
    return {layer.form if isinstance(layer, Int4Linear) else layer.weight.dtype for layer in layers}


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_held_as_it_is_stored_and_computes_the_same(tmp_path, kind):
    values = write_gguf(tmp_path / "m.gguf", kind)
    model, widened = load_model(tmp_path / "m.gguf"), Llama.from_pretrained(tmp_path / "m.gguf")
    expected = {"Q4_0": (4, 32, False), "Q4_1": (4, 32, True), "Q8_0": (8, 32, False)}
    expected |= {"F16": dtypes.float16, "BF16": dtypes.bfloat16}
    assert held(model) == {expected.get(kind, dtypes.float32)}
    assert isinstance(model.model.embed_tokens, Int4Embedding) == (kind[:2] in ("Q4", "Q8"))
    for name, tensor in widened.state_dict().items():
        assert np.array_equal(tensor.numpy(), values[name]), name
    found, wanted = (m(Tensor(TOKENS)).numpy() for m in (model, widened))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("form", ["cpu", "portable"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_generation_from_blocks_is_that_of_the_widened_weights(tmp_path, kind, form):
    write_gguf(tmp_path / "m.gguf", kind, replace(CONFIG, tie_word_embeddings=False))
    with forms.forced(form):
        new = [
            list(Generator(model).tokens([3, 1, 4, 1, 5], 12, Sampling(3.0, seed=1)))
            for model in (
                load_model(tmp_path / "m.gguf"),
                Llama.from_pretrained(tmp_path / "m.gguf"),
            )
        ]
    assert new[0] == new[1] and len(set(new[0])) > 3


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_packed_head_is_that_of_the_widened_one(tmp_path, tied):
    config = replace(CONFIG, tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", "Q8_0", config)
    model, widened = load_model(tmp_path / "m.gguf"), Llama.from_pretrained(tmp_path / "m.gguf")
    assert isinstance(model.head_layer(), Int4Embedding if tied else Int4Linear)
    int4.widen_head(model)
    assert not isinstance(model.head_layer(), Int4Embedding | Int4Linear)
    batch = on_device(random_batch(CONFIG, length=32))
    losses = [m.loss(*batch).item() for m in (model, widened)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
