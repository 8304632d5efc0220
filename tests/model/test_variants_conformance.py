"""Every variant of the architecture beside transformers: logits, and gradients of one step.

Each is a tiny random model that transformers made and saved, in its own spelling of config.json and
in that of transformers 4.
"""

import importlib
import json
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    importlib.import_module("transformers.models.llama")

from model_helpers import difference, on_device
from tinygrad import Tensor

from tinyllama import Llama
from tinyllama.data.batches import Batch
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LENGTH = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


VARIANTS = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "head_dim": ("llama", {"head_dim": 20}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    "linear": ("llama", rope(rope_type="linear", factor=3.0)),
    "dynamic, short": ("llama", rope(rope_type="dynamic", factor=2.0)),
    "dynamic, long": (
        "llama",
        {"max_position_embeddings": 24, **rope(rope_type="dynamic", factor=2.5)},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "yarn": ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}),
    "yarn, no original": ("llama", {"rope_parameters": YARN}),
    "yarn, all of it": (
        "llama",
        rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "yarn, attention_factor": (
        "llama",
        rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            attention_factor=1.7,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "ministral": ("ministral", {"sliding_window": 9, "head_dim": 12}),
    "qwen2": ("qwen2", {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}),
    "qwen2 with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "seed_oss with all biases": (
        "seed_oss",
        {
            "head_dim": 20,
            "attention_out_bias": True,
            "mlp_bias": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    ),
    "internlm3": (
        "internlm3",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    ),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A model of theirs, and the folder that they saved it in."""
    kind, options = VARIANTS[request.param]
    config = transformers.AutoConfig.for_model(kind, **(SIZES | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(float("norm" in name), spread)
    folder = tmp_path_factory.mktemp("variant") / "theirs"
    model.save_pretrained(folder)
    return model, folder


def batch(model):
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, LENGTH))
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = -1
    return Batch(*(a.astype(np.int32) for a in (tokens, targets, np.zeros_like(tokens))))


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def ours_equal_theirs(folder, model):
    tokens = batch(model).tokens
    ours = Llama.from_pretrained(folder)(Tensor(tokens).realize()).numpy()
    assert difference(ours, their_logits(model, tokens)) < 1e-4


def in_the_spelling_of_4(folder, out):
    """A copy whose config.json has rope_theta, rope_scaling and torch_dtype."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters.pop("rope_theta")
    values["torch_dtype"] = values.pop("dtype")
    if parameters["rope_type"] != "default":
        parameters["type"] = parameters["rope_type"]
        values["rope_scaling"] = parameters
    (out / "config.json").write_text(json.dumps(values))
    return out


def test_logits_equal_theirs_in_both_spellings(pair, tmp_path):
    model, folder = pair
    ours_equal_theirs(folder, model)
    ours_equal_theirs(in_the_spelling_of_4(folder, tmp_path / "old"), model)


def test_loss_and_gradients_of_one_step_equal_theirs(pair):
    model, folder = pair
    ours, rows = Llama.from_pretrained(folder), batch(model)
    labels = np.full_like(rows.targets, -100)
    labels[:, 1:] = rows.tokens[:, 1:]
    model.zero_grad()
    mean = model(torch.from_numpy(rows.tokens).long(), labels=torch.from_numpy(labels).long()).loss
    count = int((rows.targets >= 0).sum())
    (mean * count).backward()
    loss, grads = StagedLoss(ours, ours.state_dict()).gradients(*on_device(rows))
    assert float(loss.item()) / count == pytest.approx(mean.item(), rel=1e-5)
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert grads.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for name, grad in grads.items():
        # A bias of keys changes no score but by a constant per query: its gradient is rounding.
        assert difference(read(grad), expected[name], floor=1e-3 * largest) < 1e-4, name


def test_what_we_save_gives_their_logits_there(pair, tmp_path):
    model, folder = pair
    ours = Llama.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(model)
    assert again.config.model_type == model.config.model_type
    tokens = batch(model).tokens
    assert difference(their_logits(again, tokens), their_logits(model, tokens)) < 1e-5
    ours_equal_theirs(tmp_path / "ours", model)


def test_greedy_tokens_with_a_cache_equal_theirs_without_one(pair):
    """Dynamic scaling turns keys by the length of the row, which a growing row has no single one
    of: here, as in the row that is scored at once, it is the longest."""
    model, folder = pair
    ours = Llama.from_pretrained(folder)
    prompt = batch(model).tokens[0, :20].tolist()
    found = list(Generator(ours, LENGTH).tokens(prompt, 20, Sampling(temperature=0)))
    scores = their_logits(model, np.array([prompt + found]))[0, 19:-1]
    assert scores.argmax(-1).tolist() == found
