"""The tokenizer.json of a SentencePiece model, in the library that transformers uses."""

import json

import pytest
import tokenizers
from texts_helpers import lines, long_text
from tokenizers_helpers import KINDS, chatml_files, mistrals, reference, spm

from tinyllama.tokenizers.opening import from_files, open_tokenizer
from tinyllama.tokenizers.sentencepiece_json import can_be_written
from tinyllama.tokenizers.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    UNKNOWN,
    Model,
    Piece,
    read_model,
    write_model,
)


def library(tokenizer):
    made = tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
    made.encode_special_tokens = True
    return made


def ids_of(made, text):
    return made.encode(text, add_special_tokens=False).ids


EXACT = [kind for kind in KINDS if "default" not in kind and "unigram" not in kind]
OTHERS = [kind for kind in KINDS if kind not in EXACT]


@pytest.mark.parametrize("kind", EXACT)
def test_it_has_the_ids_of_sentencepiece(kind):
    own, made = reference(spm(kind)), library(from_files({"tokenizer.model": spm(kind)}, "t"))
    for line in lines():
        assert ids_of(made, line) == own.encode(line), line
    assert ids_of(made, long_text()) == own.encode(long_text())


@pytest.mark.parametrize("kind", OTHERS)
def test_normalizers_and_unigrams_have_the_ids_of_sentencepiece_on_plain_text(kind):
    own, made = reference(spm(kind)), library(from_files({"tokenizer.model": spm(kind)}, "t"))
    plain = [line for line in lines() if line.isascii() and "  " not in line and "<" not in line]
    assert len(plain) > 150
    for line in plain:
        assert ids_of(made, line) == own.encode(line), line


def test_real_models_have_their_ids():
    for model in mistrals():
        own, made = reference(model.read_bytes()), library(open_tokenizer(model))
        for line in lines():
            assert ids_of(made, line) == own.encode(line), (model, line)


def test_it_puts_begin_before_a_text_and_end_behind_where_that_is_wanted():
    made = library(from_files({"tokenizer.model": spm()}, "t"))
    assert made.encode("a").ids == [1, *ids_of(made, "a")]
    config = json.dumps({"add_bos_token": False, "add_eos_token": True}).encode()
    made = library(from_files({"tokenizer.model": spm(), "tokenizer_config.json": config}, "t"))
    assert made.encode("a").ids == [*ids_of(made, "a"), 2]


def test_ids_between_the_pieces_and_added_tokens_are_filled():
    files = chatml_files()
    size = reference(spm()).get_piece_size()
    files["added_tokens.json"] = json.dumps({"<|im_end|>": size + 40}).encode()
    tokenizer = from_files(files, "t")
    made = tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
    assert made.token_to_id("<|im_end|>") == size + 40 == tokenizer.eos_id
    assert made.get_vocab_size() == tokenizer.vocab_size == size + 41


def test_the_files_protocol_is_read_and_written():
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece("\u2581", -1.0, 1), Piece("a", -2.0, 1), Piece("\u2581a", -0.5, 1)]
    data = write_model(
        pieces, unknown_id=0, bos_id=1, eos_id=2, adds_space=True, merges_spaces=False
    )
    assert read_model(data) == Model(pieces, BPE, True, b"", True, False)
    own = reference(data)
    assert (own.unk_id(), own.bos_id(), own.eos_id(), own.pad_id()) == (0, 1, 2, -1)
    assert own.encode("a") == [len(pieces) - 1]
    for damaged in (data[:-1], b"\x0a\xff\xff\xff\xff\x7f", b"\x07", b"\x80" * 20):
        with pytest.raises(ValueError):
            read_model(damaged)


def test_a_model_that_no_tokenizer_json_can_express_goes_without():
    assert not can_be_written(Model([], spaces_behind=True))
    assert not can_be_written(Model([], kind=4))
    assert not can_be_written(Model([], escapes_spaces=False))
    assert can_be_written(Model([]))
