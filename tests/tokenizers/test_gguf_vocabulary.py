"""Vocabularies inside GGUF files: the files made of them, ids, ends, what is refused."""

import json
import struct

import numpy as np
import pytest
from texts_helpers import lines
from tokenizers_helpers import byte_level, reference, smollm2, spm

from tinyllama.errors import TokenizerError, WeightsError
from tinyllama.tokenizers.gguf import RULES, files_of_gguf
from tinyllama.tokenizers.opening import from_files, open_tokenizer
from tinyllama.tokenizers.sentencepiece_model import read_model

KEY = "tokenizer.ggml."


def of_bytes(**changes):
    """The metadata of a byte-level vocabulary."""
    made = json.loads(byte_level())["model"]
    pieces = sorted(made["vocab"], key=made["vocab"].get)
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": pieces,
        "token_type": np.array([3] * 3 + [1] * (len(pieces) - 3), np.int32),
        "merges": [" ".join(pair) for pair in made["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return with_prefix(values, changes)


def of_sentencepiece(model, **changes):
    own = read_model(model).pieces
    values = {
        "model": "llama",
        "tokens": [piece.text for piece in own],
        "scores": np.array([piece.score for piece in own], np.float32),
        "token_type": np.array([piece.kind for piece in own], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return with_prefix(values, changes)


def with_prefix(values, changes):
    return {KEY + k: v for k, v in (values | changes).items() if v is not None}


def opened(metadata, **others):
    return from_files(files_of_gguf(metadata | others, "t"), "t")


def test_a_byte_level_vocabulary_has_the_ids_of_the_tokenizer_it_came_from():
    config = json.dumps({"eos_token": "<|im_end|>"}).encode()
    own = from_files({"tokenizer.json": byte_level(), "tokenizer_config.json": config}, "t")
    found = opened(of_bytes())
    for line in lines():
        assert found.encode(line) == own.encode(line), line
    assert found.vocabulary_digest == own.vocabulary_digest
    assert (found.bos_id, found.eos_ids, found.begin) == (1, (2,), ())
    assert found.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


@pytest.mark.parametrize("kind", ["LLaMA's", "Yi's", "control symbols", "user-defined symbols"])
def test_a_sentencepiece_vocabulary_has_the_ids_of_the_model_it_came_from(kind):
    own = reference(spm(kind))
    found = opened(of_sentencepiece(spm(kind), add_space_prefix=kind != "Yi's"))
    for line in lines():
        assert found.encode(line) == own.encode(line), line
    assert (
        found.vocabulary_digest == from_files({"tokenizer.model": spm(kind)}, "t").vocabulary_digest
    )
    assert (found.bos_id, found.eos_ids, found.begin) == (1, (2,), (1,))


def test_what_the_file_says_of_begin_ends_and_template_is_kept():
    template = {"tokenizer.chat_template": "{{ messages }}"}
    found = opened(of_bytes(add_bos_token=True, eot_token_id=0, padding_token_id=0), **template)
    assert (found.begin, found.eos_ids, found.chat_template) == ((1,), (2, 0), "{{ messages }}")
    files = {name: json.loads(data) for name, data in found.files.items()}
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 0]}
    config = files["tokenizer_config.json"]
    assert (config["bos_token"], config["pad_token"]) == ("<|im_start|>", "<|endoftext|>")
    assert found.fingerprint == from_files(found.files, "again").fingerprint
    odd = opened(of_bytes(bos_token_id=-1, padding_token_id=2**32 - 1))
    assert odd.bos_id is None
    assert opened(of_bytes(pre="llama-bpe")).begin == (1,)


# Words that patterns of other models cut elsewhere.
WORDS = "It'S 12345 x1 fooBar  y\n\n z'll /a é"
CUT = {
    "default": "It|'|S| |123|45| x|1| fooBar| | y|\n\n| z|'|ll| |/|a| é",
    "gpt-2": "It|'|S| 12345| x|1| fooBar| | y|\n\n| z|'ll| /|a| é",
    "smollm": "It|'|S| |1|2|3|4|5| x|1| fooBar| | y|\n\n| z|'ll| /|a| é",
    "llama-bpe": "It|'S| |123|45| x|1| fooBar| | y|\n\n| z|'ll| /|a| é",
    "qwen2": "It|'S| |1|2|3|4|5| x|1| fooBar| | y|\n\n| z|'ll| /|a| é",
    "tekken": "It|'S| |1|2|3|4|5| x|1| foo|Bar| | y|\n\n| z|'ll| /|a| é",
    "gpt-4o": "It'S| |123|45| x|1| foo|Bar| | y|\n\n| z'll| /|a| é",
}


@pytest.mark.parametrize("name", CUT)
def test_texts_become_words_by_the_rule_that_the_file_names(name):
    import tokenizers

    files = files_of_gguf(of_bytes(pre=name), "t")
    library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    words = [WORDS[a:b] for _, (a, b) in library.pre_tokenizer.pre_tokenize_str(WORDS)]
    assert "|".join(words) == CUT[name]


def test_every_rule_is_one_that_the_library_takes():
    for name in RULES:
        assert opened(of_bytes(pre=name)).encode("a b 12") != [], name


REFUSED = {
    "no vocabulary": ({KEY + "model": None}, "t: holds no vocabulary, must be 'gpt2' or 'llama'"),
    "another kind": ({KEY + "model": "bert"}, "t: holds a vocabulary of kind 'bert'"),
    "another rule": (
        {KEY + "pre": "klingon"},
        "ggml.pre: got 'klingon', must be one of ",
    ),
    "a rule that is no name": ({KEY + "pre": 7}, "tokenizer.ggml.pre: got 7"),
    "no tokens": ({KEY + "tokens": None}, "tokenizer.ggml.tokens: missing, or not a list"),
    "no merges": ({KEY + "merges": None}, "tokenizer.ggml.merges: missing, or not a list"),
    "a bad merge": ({KEY + "merges": ["x"]}, "tokenizer.json: cannot be used: "),
    "types of others": ({KEY + "token_type": np.ones(3, np.int32)}, "damaged: must be "),
    "unknown types": ({KEY + "token_type": np.full(1200, 9, np.int32)}, "damaged: kinds [9]"),
    "twice": ({KEY + "tokens": ["a"] * 1200}, "damaged: a token is there twice"),
    "a flag": ({KEY + "add_bos_token": 1}, "add_bos_token: got 1, must be true or false"),
    "no end": ({KEY + "eos_token_id": None}, "t: no file names the token that ends a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(case):
    changes, message = REFUSED[case]
    with pytest.raises(TokenizerError) as caught:
        opened(of_bytes(), **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sentencepiece_without_scores_is_refused():
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.scores: missing"):
        opened(of_sentencepiece(spm(), scores=None))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60))
    with pytest.raises(WeightsError, match=r"a\.gguf: damaged"):
        open_tokenizer(tmp_path / "a.gguf")


def test_smollm2_is_read_from_its_real_file(tmp_path):
    tokenizer = open_tokenizer(smollm2(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2,))
    assert (tokenizer.begin, tokenizer.eos_id) == ((), 2)
    assert tokenizer.chat_template.startswith("{% for message in messages %}{% if loop.first")
    text = "<|im_start|>user\nHello there, it's 12 o'clock<|im_end|>\n"
    assert tokenizer.encode(text, special=True) == [
        1, 4093, 198, 19556, 665, 28, 357, 506, 216, 33, 34, 263, 23, 17466, 2, 198,
    ]  # fmt: skip
    for line in lines():
        assert tokenizer.decode(tokenizer.encode(line)) == line
