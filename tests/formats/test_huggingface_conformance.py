"""Folders exchanged with the real transformers, both ways; needs torch and transformers."""

import importlib
import io
import json
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    LlamaForCausalLM = importlib.import_module("transformers.models.llama").LlamaForCausalLM

from tinyllama.config import LlamaConfig
from tinyllama.formats.dtypes import to_bfloat16
from tinyllama.formats.huggingface import llama_shapes, open_folder, save_folder
from tinyllama.tokenizers.opening import from_files

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

UNTIED = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_seq_len=64,
    rope_theta=1234.0,
    rms_norm_eps=3e-5,
)
TIED = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=48,
    max_seq_len=64,
    tie_word_embeddings=True,
)
# What a folder of transformers 4 has, and one of transformers 5.
OLD = ("rope_parameters", "dtype")
NEW = ("rope_theta", "rope_scaling", "torch_dtype")


def random_tensors(config):
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(shape).astype(np.float32) / 4
        for name, shape in llama_shapes(config).items()
    }


def drop(folder, keys):
    path = folder / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: found[key] for key in found if key not in keys}))


@pytest.mark.parametrize("dropped", [(), OLD, NEW], ids=["both forms", "old form", "new form"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_saved_folder_loads_in_transformers_without_a_missing_key(tmp_path, config, dtype, dropped):
    tensors = random_tensors(config)
    limit = 5_000_000_000 if dtype == "float32" else 9_000  # the others in shards
    options = {"dtype": dtype, "files": {}, "bos_id": 1, "eos_id": [2, 5]}
    save_folder(tmp_path, config, tensors, **options, max_shard_bytes=limit)
    drop(tmp_path, dropped)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == getattr(torch, dtype)
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    assert model.config.num_key_value_heads == config.kv_heads
    assert model.config.rms_norm_eps == config.rms_norm_eps
    assert model.config.tie_word_embeddings == config.tie_word_embeddings
    assert model.config.max_position_embeddings == config.max_seq_len
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.generation_config.bos_token_id == 1
    state = model.state_dict()
    assert set(state) - set(tensors) == ({"lm_head.weight"} if config is TIED else set())
    for name, array in tensors.items():
        ours = torch.from_numpy(array).to(getattr(torch, dtype))
        assert torch.equal(state[name], ours), name
        if dtype == "bfloat16":
            assert (state[name].view(torch.uint16).numpy() == to_bfloat16(array)).all()
    if config is TIED:
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_folder_saved_by_transformers_opens_here(tmp_path, config, dtype, shard):
    torch.manual_seed(0)
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        eos_token_id=[2, 9],
    )
    model = LlamaForCausalLM(theirs).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    opened = open_folder(tmp_path)
    assert vars(opened.config) | {"num_kv_heads": config.num_kv_heads} == vars(config)
    assert (opened.bos_id, opened.eos_ids) == (1, (2, 9))
    state = model.state_dict()
    assert set(opened.names) == set(llama_shapes(config))
    for name in opened.names:
        assert (opened.float32(name) == state[name].float().numpy()).all(), name


def test_the_files_of_a_tokenizer_model_encode_alike_in_transformers(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")  # transformers reads tokenizer.model with it
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16
    )
    files = from_files({"tokenizer.model": model.getvalue()}, "tokenizer.model").files
    options = {"dtype": "float32", "files": files, "bos_id": 1, "eos_id": 2}
    save_folder(tmp_path, config, random_tensors(config), **options)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    # Not with a space in front: transformers 5 drops one there (its Metaspace adds none before it).
    for line in ["the lazy box", "five  dogs", "Größe 世界 🙂", "a", "x\ny", "trailing  "]:
        assert theirs(line).input_ids == [1, *ours.encode(line)], line
        assert theirs.decode(ours.encode(line)) == ours.decode(ours.encode(line)), line
