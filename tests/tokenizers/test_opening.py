"""Which tokenizer a path gives, and what is said where there is none."""

import json

import pytest
from tokenizers_helpers import (
    byte_level,
    byte_level_files,
    chatml_files,
    spm,
    write_files_of,
)

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.huggingface import JsonTokenizer
from tinyllama.tokenizers.opening import from_files, holds_tokenizer, open_tokenizer
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer


def test_a_tokenizer_model_with_the_pieces_of_the_tokenizer_json_is_taken(tmp_path):
    made = from_files(chatml_files(), "t").files
    folder = write_files_of(dict(made), tmp_path / "both")
    assert isinstance(open_tokenizer(folder), SentencePieceTokenizer)


@pytest.mark.parametrize(
    "model", [spm("Yi's"), b"not SentencePiece"], ids=["stale", "another kind"]
)
def test_a_tokenizer_model_with_other_pieces_is_left_aside_and_travels(model, tmp_path):
    files = byte_level_files() | {"tokenizer.model": model}
    found = open_tokenizer(write_files_of(files, tmp_path / "both"))
    assert isinstance(found, JsonTokenizer)
    assert found.files["tokenizer.model"] == model
    assert found.encode("a b") == from_files(byte_level_files(), "t").encode("a b")


def test_a_file_alone_is_opened_as_what_it_is(tmp_path):
    folder = write_files_of(chatml_files(), tmp_path / "model")
    alone = open_tokenizer(folder / "tokenizer.model")
    assert alone.fingerprint == from_files({"tokenizer.model": spm()}, "t").fingerprint
    other = tmp_path / "mine.json"
    other.write_bytes(byte_level())
    with pytest.raises(TokenizerError, match=r"mine\.json: no file names the token that ends"):
        open_tokenizer(other)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (tmp_path / "tokenizer.json").write_bytes(byte_level())
    assert open_tokenizer(tmp_path / "tokenizer.json").eos_ids == (0,)


def test_where_there_is_none_the_message_says_what_is_there(tmp_path):
    assert not holds_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"its tekken\.json cannot be read: take the same"):
        open_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"none\.model: no such file"):
        open_tokenizer(tmp_path / "none.model")


def test_a_file_of_no_size_that_a_tokenizer_has_is_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    with open(file, "wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(TokenizerError, match="more than 256 MiB, which no tokenizer has"):
        open_tokenizer(file)


def test_a_folder_is_a_tokenizers_only_if_its_files_are_regular(tmp_path):
    (tmp_path / "tokenizer.model").mkdir()
    assert not holds_tokenizer(tmp_path)
