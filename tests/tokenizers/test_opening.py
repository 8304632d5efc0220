"""Which tokenizer a path gives, and what is said where there is none."""

import json
import os

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
    with pytest.raises(TokenizerError, match="more than 64 MiB, which no tokenizer has"):
        open_tokenizer(file)


def test_a_folder_is_a_tokenizers_only_if_its_files_are_regular(tmp_path):
    (tmp_path / "tokenizer.model").mkdir()
    assert not holds_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path, name):
    file = tmp_path / name
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero")):
        make()
        with pytest.raises(TokenizerError, match=f"{name}: is no regular file"):
            open_tokenizer(file)
        file.unlink()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": ["x" * 10**6]}}, "an added token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x" * 10**6: {"content": "a"}}},
            "id '",
        ),
        ("tokenizer_config.json", {"add_bos_token": ["x" * 10**6]}, "add_bos_token: got ["),
        ("tokenizer_config.json", {"extra_special_tokens": "x" * 10**6}, "must be a list of texts"),
        ("special_tokens_map.json", {"bos_token": {"content": [1] * 10**5}}, "bos_token: got {"),
        ("added_tokens.json", {"x" * 10**6: "y"}, "the added token 'xxx"),
        ("generation_config.json", {"eos_token_id": "x" * 10**6}, "eos_token_id 'xxx"),
        ("tokenizer_config.json", {"a": "x" * (5 << 20)}, "more than 4 MiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_message_about_a_file_is_short(tmp_path, name, data, said):
    (tmp_path / "tokenizer.model").write_bytes(spm())
    (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(tmp_path)
    message = str(caught.value)
    assert said in message and message.isprintable() and len(message) < 500 + len(str(tmp_path))
