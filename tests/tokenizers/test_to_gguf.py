"""Tokenizers as the metadata of GGUF: pieces, kinds, scores, merges, and the name of a pattern."""

import json

import numpy as np
import pytest
from runs_helpers import tokenizer as trained
from texts_helpers import lines
from tokenizers_helpers import byte_level_files, spm

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.gguf import files_of_gguf
from tinyllama.tokenizers.huggingface import JsonTokenizer
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer
from tinyllama.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    write_model,
)
from tinyllama.tokenizers.to_gguf import pre_tokenizer_name, vocabulary_fields

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# As in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(pattern):
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


class Files:
    """A tokenizer of these files, as far as a GGUF file needs it."""

    def __init__(self, files, bos_id=None, eos_ids=(), begins=False, template=None):
        self.files = {name: json.dumps(value).encode() for name, value in files.items()}
        self.bos_id, self.eos_ids, self.chat_template = bos_id, eos_ids, template
        self.begin = (bos_id,) if begins else ()


def bpe(**changes):
    """A tokenizer.json of six pieces, the last two of them added."""
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3},
        "merges": [["a", "b"]],
        "ignore_merges": False,
    }
    return {
        "normalizer": None,
        "pre_tokenizer": sequence(DIGITS, WORDS),
        "added_tokens": [
            {"id": 4, "content": "<|im_end|>", "special": True},
            {"id": 5, "content": "<tool>", "special": False},
        ],
        "model": model,
    } | changes


@pytest.mark.parametrize(
    ("steps", "ignores", "name"),
    [
        (WORDS, False, "gpt-2"),
        (sequence(DIGITS, WORDS), False, "smollm"),
        (sequence(split(LLAMA3), BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA3), BYTES), False, "smaug-bpe"),
        (sequence(split(QWEN2), BYTES), False, "stablelm2"),
    ],
)
def test_a_pattern_has_llama_cpps_name(steps, ignores, name):
    described = {"pre_tokenizer": steps, "model": {"ignore_merges": ignores}}
    assert pre_tokenizer_name(described, "t") == name
    composing = described | {"normalizer": {"type": "NFC"}}
    assert pre_tokenizer_name(composing, "t") == ("qwen2" if name == "stablelm2" else name)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"pre_tokenizer": sequence(split(LLAMA3 + "|x"), BYTES)}, "for which llama.cpp has no"),
        ({"pre_tokenizer": WORDS | {"add_prefix_space": True}}, "for which llama.cpp has no name"),
        ({"pre_tokenizer": None}, "pre_tokenizer: got []"),
        ({"pre_tokenizer": WORDS, "model": {"ignore_merges": True}}, "ignore_merges True"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer: got Lowercase"),
    ],
)
def test_a_pattern_without_a_name_is_refused(changed, problem):
    with pytest.raises(TokenizerError) as error:
        pre_tokenizer_name(bpe() | changed, "folder")
    assert problem in str(error.value) and str(error.value).startswith("folder: tokenizer.json: ")


def test_bytes_are_written_with_their_merges_and_kinds():
    files = Files(
        {"tokenizer.json": bpe(), "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        bos_id=4,
        eos_ids=(4, 2),
        template="{{ x }}",
    )
    assert vocabulary_fields(files, 8, "folder") == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "Ġ", "<|im_end|>", "<tool>", "[PAD6]", "[PAD7]"],
        "tokenizer.ggml.token_type": [NORMAL] * 4 + [CONTROL, USER_DEFINED, UNUSED, UNUSED],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 4,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }


def test_both_spellings_of_merges_are_read():
    described = bpe()
    described["model"]["merges"] = ["a b"]
    files = Files({"tokenizer.json": described})
    assert vocabulary_fields(files, 6, "t")["tokenizer.ggml.merges"] == ["a b"]


def test_a_json_with_bytes_for_unknown_characters_gets_scores_that_merge_alike():
    """The form of LLaMA 2's and Mistral's tokenizer.json: earlier merges have higher scores."""
    space = "\u2581"
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "c": 5, "bc": 6, "ab": 7}
    files = Files(
        {
            "tokenizer.json": {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": space},
                        {"type": "Replace", "pattern": {"String": " "}, "content": space},
                    ],
                },
                "pre_tokenizer": None,
                "added_tokens": [
                    {"id": 0, "content": "<unk>", "special": True},
                    {"id": 1, "content": "<s>", "special": True},
                ],
                "model": {
                    "type": "BPE",
                    "vocab": vocab,
                    "merges": ["b c", "a b"],
                    "byte_fallback": True,
                    "unk_token": "<unk>",
                },
            }
        },
        bos_id=1,
        begins=True,
    )
    fields = vocabulary_fields(files, 8, "t")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.token_type"] == [UNKNOWN, CONTROL, BYTE] + [NORMAL] * 5
    scores = fields["tokenizer.ggml.scores"]
    assert scores[6] > scores[7] > scores[3] == scores[5]
    assert fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.ggml.add_space_prefix"]
    assert fields["tokenizer.ggml.unknown_token_id"] == 0


def test_a_sentencepiece_model_keeps_its_pieces_scores_and_kinds():
    own = trained()
    fields = vocabulary_fields(own, own.vocab_size + 2, "t")
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and kinds[258:260] == [BYTE, NORMAL]
    assert pieces[-2:] == ["[PAD400]", "[PAD401]"] and kinds[-2:] == [UNUSED] * 2
    ids = own.encode("import sys")
    assert "".join(pieces[i] for i in ids) == "\u2581import\u2581sys"
    merged = [i for i in range(259, own.vocab_size) if len(pieces[i]) > 1]
    scores = [fields["tokenizer.ggml.scores"][i] for i in merged]
    assert scores == sorted(scores, reverse=True) and len(scores) > 50


def test_tokens_added_to_a_sentencepiece_model_are_there_with_their_kind():
    own = trained()
    added = {
        "400": {"content": "<|im_start|>", "special": True},
        "401": {"content": "<tool>", "special": False},
    }
    settings = json.dumps({"added_tokens_decoder": added}).encode()
    model = own.files["tokenizer.model"]
    files = {"tokenizer.model": model, "tokenizer_config.json": settings}
    fields = vocabulary_fields(SentencePieceTokenizer(model, "t", files), 402, "t")
    assert fields["tokenizer.ggml.tokens"][400:] == ["<|im_start|>", "<tool>"]
    assert fields["tokenizer.ggml.token_type"][400:] == [CONTROL, USER_DEFINED]


def test_more_ids_than_rows_and_pieces_that_appear_twice_are_refused():
    with pytest.raises(TokenizerError, match="has an id 5, must be below 5, the rows of the model"):
        vocabulary_fields(Files({"tokenizer.json": bpe()}), 5, "t")
    twice = bpe(added_tokens=[{"id": 4, "content": "ab", "special": True}])
    with pytest.raises(TokenizerError, match="'ab' is the piece of two ids"):
        vocabulary_fields(Files({"tokenizer.json": twice}), 5, "t")


def test_a_model_that_is_no_byte_pair_encoding_is_refused():
    pieces = [Piece(text, 0.0, kind) for text, kind in (("<unk>", UNKNOWN), ("a", NORMAL))]
    data = write_model(
        pieces, unknown_id=0, bos_id=None, eos_id=None, adds_space=True, merges_spaces=False
    )
    files = Files({})
    files.files = {"tokenizer.model": data + b"\x12\x02\x18\x01"}  # model_type = UNIGRAM
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: has no byte-pair encoding"):
        vocabulary_fields(files, 2, "t")


def as_read(fields):
    """Metadata as a GGUF file is read: lists of numbers are arrays."""
    return {
        key: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for key, value in fields.items()
    }


@pytest.mark.parametrize(
    "kind", ["bytes", "LLaMA's", "LLaMA's tokenizer.json", "Yi's tokenizer.json"]
)
def test_ids_of_many_scripts_are_the_same_when_read_back(kind):
    """As llama.cpp reads them (`make llamacpp` compares with itself)."""
    if kind == "bytes":
        own = JsonTokenizer(byte_level_files(), "t")
    else:
        own = from_files({"tokenizer.model": spm(kind.removesuffix(" tokenizer.json"))}, "t")
        if kind.endswith("json"):
            left = {name: data for name, data in own.files.items() if name != "tokenizer.model"}
            own = JsonTokenizer(left, "t")
    fields = vocabulary_fields(own, own.vocab_size + 3, "t")
    again = from_files(files_of_gguf(as_read(fields), "t"), "t")
    assert again.begin == own.begin and set(again.eos_ids) == set(own.eos_ids)
    for line in lines():
        if "\u2581" not in line:  # llama.cpp takes it for a space
            assert again.encode(line) == own.encode(line), line
