"""Vocabularies of GGUF files in llama.cpp itself; needs llama-cpp-python and gguf."""

import json
import re
import unicodedata

import numpy as np
import pytest
from texts_helpers import lines
from tokenizers_helpers import byte_level, mistrals, smollm2, spm

from tinyllama.tokenizers.gguf import RULES
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.sentencepiece_model import read_model

llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("default")
TURN = "<|im_start|>user\nhello there<|im_end|>\n<s>[INST] a [/INST]</s> b"


def llamas_ids(path, texts, special=False):
    """The ids that llama.cpp gives for texts."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=special) for text in texts]


def write_vocabulary(path, kind, pieces, types, **values):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_bytes(path, rule):
    made = json.loads(byte_level())["model"]
    pieces = sorted(made["vocab"], key=made["vocab"].get)
    return write_vocabulary(
        path, "gpt2", pieces, [3] * 3 + [1] * (len(pieces) - 3),
        tokenizer_pre=rule, token_merges=[" ".join(pair) for pair in made["merges"]],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def of_sentencepiece(path, model):
    pieces = read_model(model).pieces
    return write_vocabulary(
        path, "llama", [p.text for p in pieces], [p.kind for p in pieces],
        token_scores=np.array([p.score for p in pieces], np.float32).tolist(),
        bos_token_id=1, eos_token_id=2, unk_token_id=0,
    )  # fmt: skip


def differing(path, texts, special=False):
    own = open_tokenizer(path)
    theirs = llamas_ids(path, texts, special)
    found = [own.encode(text, special=special) for text in texts]
    return [t for t, a, b in zip(texts, found, theirs, strict=True) if a != b]


# llama.cpp reads a NUL as the end of a text, and U+2581 as a space.
TEXTS = [line for line in lines() if "\0" not in line and "\u2581" not in line]


@pytest.mark.parametrize("rule", RULES)
def test_ids_of_every_rule_are_llamas(rule, tmp_path):
    path = of_bytes(tmp_path / "a.gguf", rule)
    texts = TEXTS
    if RULES[rule].composes:  # as the models' own tokenizers do, and llama.cpp does not
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    if "Lu" in RULES[rule].patterns[0]:  # llama.cpp takes some marks of Tibetan for no marks
        texts = [text for text in texts if not re.search("[\u0f00-\u0fff]", text)]
    assert differing(path, texts) == []


def test_smollm2_has_llamas_ids(tmp_path):
    model = smollm2(tmp_path)
    assert differing(model, TEXTS) == []
    assert differing(model, [TURN, *TEXTS], special=True) == []


@pytest.mark.parametrize("kind", ["LLaMA's", "control symbols"])
def test_ids_of_sentencepiece_vocabularies_are_llamas(kind, tmp_path):
    path = of_sentencepiece(tmp_path / "a.gguf", spm(kind))
    assert differing(path, TEXTS) == []
    assert differing(path, [TURN], special=True) == []


def test_ids_of_real_sentencepiece_vocabularies_are_llamas(tmp_path):
    for model in mistrals():
        path = of_sentencepiece(tmp_path / "a.gguf", model.read_bytes())
        assert differing(path, TEXTS) == [], model
