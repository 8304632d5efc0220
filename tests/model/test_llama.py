"""The model: its logits and losses by the formula, its names, its folder, its first weights."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import (
    EVERY_HEAD,
    GROUPED,
    ONE_KEY,
    SQUARE,
    TIED,
    build,
    difference,
    loss_and_gradients,
    on_device,
    random_batch,
    random_weights,
    reference_logits,
    reference_loss,
)
from tinygrad import Tensor, dtypes

from tinyllama import Llama, LlamaConfig
from tinyllama.data.batches import Batch
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import llama_shapes, open_folder
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.ops import forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.gradients import StagedLoss

CONFIGS = {"grouped": GROUPED, "tied": TIED, "every head": EVERY_HEAD, "one key": ONE_KEY}


def logits_of(model, tokens):
    return model(Tensor(tokens).realize()).numpy()


def summed_loss(model, batch):
    return float(StagedLoss(model).loss(*on_device(batch)).item())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_formula(name):
    config = CONFIGS[name]
    tokens = random_batch(config).tokens
    expected = reference_logits(random_weights(config), config, tokens)
    found = logits_of(build(config), tokens)
    assert (found.dtype, found.shape) == (np.float32, (*tokens.shape, config.vocab_size))
    assert difference(found, expected) < 1e-5


def test_logits_of_the_portable_form_equal_the_formula():
    tokens = random_batch(GROUPED).tokens
    expected = reference_logits(random_weights(GROUPED), GROUPED, tokens)
    with forms.forced("portable"):
        assert difference(logits_of(build(GROUPED), tokens), expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(dtypes.bfloat16, 4e-2), (dtypes.float16, 5e-3)], ids=str
)
def test_narrow_activations_give_float32_logits_near_the_formula(dtype, tolerance):
    tokens = random_batch(SQUARE).tokens
    expected = reference_logits(random_weights(SQUARE), SQUARE, tokens)
    found = logits_of(build(SQUARE, dtype=dtype), tokens)
    assert found.dtype == np.float32
    assert 1e-6 < difference(found, expected) < tolerance


def test_loss_without_gradients_equals_the_formula_and_the_loss_with_them():
    for config in (GROUPED, TIED):
        loss = summed_loss(build(config), random_batch(config))
        expected = reference_loss(random_weights(config), config, random_batch(config))
        assert loss == pytest.approx(expected, rel=1e-6)
        assert loss == pytest.approx(loss_and_gradients(config)[0], rel=1e-6)


def test_later_tokens_do_not_change_earlier_logits():
    model, tokens = build(GROUPED), random_batch(GROUPED).tokens
    changed = tokens.copy()
    changed[:, 20:] = (changed[:, 20:] + 1) % GROUPED.vocab_size
    before, after = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_documents_packed_in_a_row_have_the_losses_of_rows_of_their_own(form):
    """Each row of `packed` holds two documents; in `own` each fills the front of its own row."""
    packed = random_batch(GROUPED)
    T = packed.tokens.shape[1]
    with forms.forced(form):
        model = build(GROUPED)
        for row in range(2):
            cut = int(packed.starts[row, -1])
            own = Batch(*(np.zeros_like(part) for part in packed))
            own.targets[:] = -1
            own.starts[0, cut:], own.starts[1, T - cut :] = cut, T - cut
            for place, part in ((0, slice(0, cut)), (1, slice(cut, T))):
                length = part.stop - part.start
                own.tokens[place, :length] = packed.tokens[row, part]
                own.targets[place, :length] = packed.targets[row, part]
            for place, part in ((0, slice(0, cut)), (1, slice(cut, T))):
                only_packed, only_own = np.full_like(own.targets, -1), np.full_like(own.targets, -1)
                only_packed[row, part] = packed.targets[row, part]
                only_own[place] = own.targets[place]
                expected = summed_loss(model, own._replace(targets=only_own))
                found = summed_loss(model, packed._replace(targets=only_packed))
                assert found == pytest.approx(expected, rel=1e-6)
                # Were the row one document, its second part would have another loss.
                joined = packed._replace(targets=only_packed, starts=np.zeros_like(packed.starts))
                assert (abs(summed_loss(model, joined) - expected) > 1e-2) == (place == 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_the_names_and_shapes_of_hugging_face(name):
    config = CONFIGS[name]
    model = Llama(config)
    expected = llama_shapes(config)
    assert {n: t.shape for n, t in model.state_dict().items()} == expected
    assert all(t.dtype == dtypes.float32 for t in model.parameters())
    assert len(model.parameters()) == len(expected)
    assert model.count_parameters() == sum(math.prod(shape) for shape in expected.values())
    assert ("lm_head.weight" in expected) == (not config.tie_word_embeddings)


def test_first_weights_come_from_the_seed_and_have_the_spread_they_should():
    config = replace(SQUARE, hidden_size=128, intermediate_size=128, num_layers=3)
    first, again, other = (Llama(config, seed=seed).state_dict() for seed in (5, 5, 6))
    seen = set()
    for name, tensor in first.items():
        values = read(tensor)
        assert values.tobytes() == read(again[name]).tobytes(), name
        if values.ndim == 1:
            assert (values == 1).all(), name
            continue
        assert (values != read(other[name])).any(), name
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * 3) if into_stream else 0.02
        assert values.std() == pytest.approx(deviation, rel=0.05), name
        assert abs(values.mean()) < 0.1 * deviation, name
        seen.add(values.tobytes())
    assert len(seen) == sum(t.ndim == 2 for t in first.values())


def test_a_new_model_guesses_evenly():
    batch = random_batch(GROUPED)
    loss = summed_loss(Llama(GROUPED), batch) / (batch.targets >= 0).sum()
    assert loss == pytest.approx(math.log(GROUPED.vocab_size), rel=0.02)


@pytest.mark.parametrize("config", [GROUPED, TIED], ids=["untied", "tied"])
def test_a_saved_model_loads_as_it_was(config, tmp_path):
    model, tokens = build(config), random_batch(config).tokens
    folder = model.save_pretrained(tmp_path / "model")
    loaded = Llama.from_pretrained(folder)
    assert loaded.config == replace(config, num_kv_heads=config.kv_heads)
    for name, tensor in model.state_dict().items():
        assert read(loaded.state_dict()[name]).tobytes() == read(tensor).tobytes(), name
    assert logits_of(loaded, tokens).tobytes() == logits_of(model, tokens).tobytes()


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_a_model_saved_in_a_narrow_type_loads_rounded_to_it(dtype, bits, tmp_path):
    model = build(GROUPED)
    model.save_pretrained(tmp_path / "model", dtype=dtype)
    loaded = Llama.from_pretrained(tmp_path / "model", dtype=dtypes.bfloat16)
    assert loaded.dtype == dtypes.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtypes.float32
        found, expected = read(tensor), read(model.state_dict()[name])
        assert 0 < difference(found, expected) <= 2.0**-bits, name


def test_saving_onto_something_is_refused_and_leaves_it_alone(tmp_path):
    model = build(SQUARE)
    folder = model.save_pretrained(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    write(model.model.norm.weight, np.zeros(SQUARE.hidden_size, np.float32))
    with pytest.raises(FileExistsError, match="model"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_there_or_holds_nothing_is_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: not a folder"):
        Llama.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Llama.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    folder = build(GROUPED).save_pretrained(tmp_path / "model")
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: np.array(file.array(name)) for name in open_folder(folder).names}
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((72, 48), np.float32)
    write_safetensors(folder / "model.safetensors", tensors, {})
    with pytest.raises(WeightsError) as caught:
        Llama.from_pretrained(folder)
    text = str(caught.value)
    assert "model.norm.weight: missing" in text
    assert "model.layers.1.mlp.up_proj.weight: shape (3, 4), must be (72, 48)" in text
    assert "model.layers.2.mlp.up_proj.weight: extra, no such parameter" in text


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ConfigError, match="hidden_size"):
        LlamaConfig(hidden_size=100, num_heads=3)
    with pytest.raises(ConfigError, match="num_kv_heads"):
        LlamaConfig(hidden_size=64, num_heads=4, num_kv_heads=3)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_token_beyond_the_vocabulary_reads_as_an_embedding_of_zeros(form):
    """It harms no other token; the tokenizer is checked against vocab_size before a run."""
    tokens = random_batch(GROUPED).tokens.copy()
    tokens[0, 20] = GROUPED.vocab_size
    zeros = np.concatenate(
        [random_weights(GROUPED)["model.embed_tokens.weight"], np.zeros((1, 48))]
    )
    weights = random_weights(GROUPED) | {"model.embed_tokens.weight": zeros}
    with forms.forced(form):
        found = logits_of(build(GROUPED), tokens)
    assert difference(found, reference_logits(weights, GROUPED, tokens)) < 1e-5


def test_what_a_base_says_and_is_still_true_is_written_back(tmp_path):
    build(GROUPED).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    extra = {"model_type": "mistral", "pad_token_id": 7, "of_theirs": [1], "eos_token_id": [2, 5]}
    extra |= {"sliding_window": None, "auto_map": {"AutoModel": "code.py"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    (tmp_path / "base" / "generation_config.json").unlink()
    Llama.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("model_type", "pad_token_id", "of_theirs", "eos_token_id", "sliding_window"):
        assert written[key] == extra[key], key
    assert written["architectures"] == ["MistralForCausalLM"]
    assert "auto_map" not in written
