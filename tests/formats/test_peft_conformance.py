"""Adapters exchanged with the real PEFT, both ways; needs torch, transformers and peft."""

import importlib
import json
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    peft = pytest.importorskip("peft", minversion="0.18")
    LlamaForCausalLM = importlib.import_module("transformers.models.llama").LlamaForCausalLM

from lora_helpers import randomize, write_base
from tinygrad import Tensor

from tinyllama.config import ALL_LINEAR, LlamaConfig
from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.peft import AdapterConfig, AdapterFolder, Placement
from tinyllama.model.build import load_model
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.model.lora import attach, write_adapter

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    max_seq_len=32,
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("peft") / "base", CONFIG)


@pytest.fixture(scope="module")
def their_base(base):
    return their_logits(LlamaForCausalLM.from_pretrained(base))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


def our_logits(model):
    return model(Tensor(TOKENS).realize()).numpy()


def assert_alike(ours, theirs, without):
    """To 1e-4, and not because the adapter does nothing."""
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(theirs - without).max() > 1e-1


def ours_of(base, placed_by_name, **options):
    """Our model with random adapters, and their configuration."""
    model = Llama.from_pretrained(base)
    linears = [(path, name) for path, _, name in block_linears(model.model.layers)]
    placed = {path: placed_by_name[name] for path, name in linears if name in placed_by_name}
    config = AdapterConfig(placed, base=str(base), **options)
    attach(model, config, seed=1)
    randomize(model)
    return model, config


FOUR, EIGHT = Placement(4, 8.0), Placement(8, 2.0)


@pytest.mark.parametrize(
    ("placed", "use_rslora"),
    [
        ({"q_proj": FOUR, "v_proj": FOUR}, False),
        (dict.fromkeys(ALL_LINEAR, FOUR), True),
        ({"q_proj": FOUR, "k_proj": FOUR, "down_proj": EIGHT}, False),
    ],
    ids=["plain", "all-linear with rslora", "two ranks"],
)
def test_a_folder_written_here_loads_in_peft(base, their_base, tmp_path, placed, use_rslora):
    model, config = ours_of(base, placed, use_rslora=use_rslora)
    write_adapter(tmp_path, model, config)
    with warnings.catch_warnings():
        # Keys that PEFT does not know, or misses, are warnings. (What it uses itself of
        # transformers' old names is a FutureWarning, and not ours.)
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path)
    assert_alike(our_logits(model), their_logits(theirs), their_base)
    merged = their_logits(theirs.merge_and_unload())
    assert np.abs(merged - our_logits(model)).max() < 1e-4


def test_a_folder_where_only_some_layers_have_adapters_loads_in_peft(base, their_base, tmp_path):
    model, config = ours_of(base, {"q_proj": FOUR, "o_proj": EIGHT})
    one = {path: place for path, place in config.placed.items() if "1.self_attn.o" not in path}
    model = Llama.from_pretrained(base)
    config = AdapterConfig(one, base=str(base))
    attach(model, config, seed=1)
    randomize(model)
    write_adapter(tmp_path, model, config)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == 3
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path)
    assert_alike(our_logits(model), their_logits(theirs), their_base)


def save_theirs(base, folder, **options):
    """An adapter that PEFT made, with B not zero, and its logits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return their_logits(model)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": r".*\.(q_proj|down_proj)"},
        {"r": 4, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "rank_pattern": {"q_proj": 6, r"layers\.1\..*gate_proj": 2},
            "alpha_pattern": {"model.layers.0.self_attn.k_proj": 32, "gate_proj": 3},
        },
    ],
    ids=["plain", "all-linear with rslora", "expression", "layers_to_transform", "patterns"],
)
def test_a_folder_written_by_peft_loads_here(base, their_base, tmp_path, options):
    theirs = save_theirs(base, tmp_path, **options)
    assert_alike(our_logits(load_model(tmp_path)), theirs, their_base)


def test_an_adapter_read_from_peft_is_written_back_as_the_same_tensors(base, tmp_path):
    from safetensors.numpy import load_file

    options = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}}
    save_theirs(base, tmp_path / "theirs", r=4, **options)
    config = AdapterFolder(tmp_path / "theirs").config(open_folder(base).config)
    model = load_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model, config)
    first, again = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")
    )
    assert first.keys() == again.keys()
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, "use_dora: got True, must be absent or empty"),
        ({"bias": "lora_only"}, "bias: got 'lora_only', must be 'none'"),
    ],
    ids=["dora", "bias"],
)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(base, tmp_path, options, expected):
    save_theirs(base, tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(ConfigError) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/adapter_config.json: {expected}")


def trained(base, folder, **options):
    """An adapter of PEFT's whose every trained tensor has moved; its logits, and those of its
    merged model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    logits = their_logits(model)
    return logits, their_logits(model.merge_and_unload())


OUTSIDE = {
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["v_proj", "embed_tokens"]},
    "embed_tokens and lm_head": {"target_modules": ["embed_tokens", "lm_head"]},
    "modules_to_save": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "norms as a whole": {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]},
    "a layer as a whole": {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]},
    "an expression": {"target_modules": r"lm_head|.*\.(q_proj|down_proj)"},
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_an_adapter_changes_outside_of_its_layers_is_loaded_and_merged(
    base, their_base, tmp_path, case
):
    theirs, merged = trained(base, tmp_path / "a", **OUTSIDE[case])
    assert_alike(our_logits(load_model(tmp_path / "a")), theirs, their_base)
    merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert_alike(our_logits(Llama.from_pretrained(tmp_path / "out")), merged, their_base)
    again = their_logits(LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    assert np.abs(again - merged).max() < 1e-4


@pytest.mark.parametrize("case", ["lm_head", "embed_tokens", "modules_to_save"])
@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_that_an_adapter_changes_becomes_a_matrix_of_its_own(tmp_path, case):
    """As the adapted model computes. PEFT's own merge adds to the one tied matrix, and so to both
    its uses, which is another model: it warns of that."""
    config = LlamaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": True})
    base = write_base(tmp_path / "base", config)
    theirs, _ = trained(base, tmp_path / "a", **OUTSIDE[case])
    without = their_logits(LlamaForCausalLM.from_pretrained(base))
    assert_alike(our_logits(load_model(tmp_path / "a")), theirs, without)
    merge(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert_alike(our_logits(Llama.from_pretrained(tmp_path / "out")), theirs, without)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert not again.config.tie_word_embeddings
    assert_alike(their_logits(again), theirs, without)
