"""tokenizer.json through Hugging Face's tokenizers: ids, cuts, round trips, ends, errors."""

import json
import random
import re
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts_helpers import lines, long_text
from tokenizers_helpers import (
    CHATML_CONFIG,
    SPECIALS,
    byte_level,
    byte_level_files,
    reference,
    spm,
    write_files_of,
)

from tinyllama.data import corpus, files
from tinyllama.errors import TokenizerError
from tinyllama.tokenizers import huggingface
from tinyllama.tokenizers.huggingface import JsonTokenizer
from tinyllama.tokenizers.opening import from_files, open_tokenizer


def from_spm(kind="LLaMA's"):
    """The tokenizer.json of a SentencePiece model, without that model."""
    made = dict(from_files({"tokenizer.model": spm(kind)}, "t").files)
    del made["tokenizer.model"]
    return JsonTokenizer(made, "t")


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return JsonTokenizer(byte_level_files(), "t")


@pytest.fixture(params=["bytes", "LLaMA's", "Yi's"], scope="module")
def each(request):
    return (
        JsonTokenizer(byte_level_files(), "t")
        if request.param == "bytes"
        else from_spm(request.param)
    )


def library(tokenizer):
    """The same file in the library itself, which finds no special tokens."""
    made = tokenizers.Tokenizer.from_buffer(tokenizer.sources["tokenizer.json"])
    made.encode_special_tokens = True
    return made


def test_ids_are_those_of_the_library_on_a_thousand_lines(each):
    own = library(each)
    assert len(lines()) > 1000
    for line in lines():
        assert each.encode(line) == own.encode(line, add_special_tokens=False).ids, line


def test_a_long_text_has_the_ids_of_the_whole(each, monkeypatch):
    monkeypatch.setattr(huggingface, "_CUT_CHARS", 100)
    text = long_text()
    assert len(text) > 100_000
    assert each.joint is not None
    whole = library(each).encode(text, add_special_tokens=False).ids
    assert each.encode(text) == whole


def test_a_long_text_with_special_tokens_has_the_ids_of_the_whole(bytes_tokenizer, monkeypatch):
    turns = "".join(f"<|im_start|>user\n{line}<|im_end|>\n" for line in lines()[:400])
    own = tokenizers.Tokenizer.from_buffer(byte_level())
    whole = own.encode(turns, add_special_tokens=False).ids
    assert whole.count(bytes_tokenizer.eos_id) >= 400
    monkeypatch.setattr(huggingface, "_CUT_CHARS", 100)
    assert bytes_tokenizer.encode(turns, special=True) == whole


def trained_on_words_of(pattern):
    """A tokenizer whose words are the matches of a pattern, so that its pieces may hold spaces."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    words = pre.Split(tokenizers.Regex(pattern), "isolated")
    made.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIALS], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([long_text()], trainer)
    return JsonTokenizer({**byte_level_files(), "tokenizer.json": made.to_str().encode()}, "t")


def test_a_text_is_cut_only_where_no_piece_can_lie_across(monkeypatch):
    monkeypatch.setattr(huggingface, "_CUT_CHARS", 100)
    lines_alone = trained_on_words_of(r"[^\n]+|\n")
    assert lines_alone.joint.search("two words") is None
    assert lines_alone.joint.search("two\nlines") is not None
    for tokenizer in (lines_alone, trained_on_words_of(r"[\s\S]+")):
        text = long_text()[:20_000]
        whole = library(tokenizer).encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == whole


def test_a_file_cut_into_chunks_has_the_ids_of_the_whole(each, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = long_text()[:60_000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    for size in (700, 5000):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        dataset = corpus.prepare("a.txt", each, f"cache{size}", workers=1, progress=False)
        whole = library(each).encode(text, add_special_tokens=False).ids
        assert dataset.tokens.tolist() == [*each.begin, *whole, each.eos_id]
        assert dataset.starts.tolist() == [0]
        assert dataset.text_bytes == len(text.encode())


@pytest.mark.parametrize("text", [*lines()[:60], "a\n b", "👩‍👩‍👧 🇨🇭", "\u0301x"])
def test_every_text_survives(each, text):
    assert each.decode(each.encode(text)) == text.replace("\u2581", " ")
    stream = each.stream()
    streamed = [stream.push(piece) for piece in each.encode(text)]
    assert "".join(streamed) + stream.flush() == text.replace("\u2581", " ")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\r\0a'1")))
def test_any_text_survives(text):
    tokenizer = JsonTokenizer(byte_level_files(), "t") if not _made else _made[0]
    _made[:] = [tokenizer]
    assert tokenizer.decode(tokenizer.encode(text)) == text


_made: list[JsonTokenizer] = []


def test_decoding_agrees_with_the_library(each):
    own = tokenizers.Tokenizer.from_buffer(each.sources["tokenizer.json"])
    drawn = random.Random(7)
    # Beside a byte that is no character the library drops characters that are.
    first = each.pieces.index("<0xFF>") + 1 if "<0xFF>" in each.pieces else 3
    for _ in range(1000):
        ids = [drawn.randrange(first, each.vocab_size) for _ in range(6)]
        expected = own.decode(ids, skip_special_tokens=True)
        # The library shows several bytes that are no character as one U+FFFD.
        found = re.sub("\ufffd+", "\ufffd", each.decode(ids))
        assert found == re.sub("\ufffd+", "\ufffd", expected)


def test_a_continued_text_gets_no_space_before_its_first_word():
    tokenizer = from_spm()
    whole = tokenizer.encode("first line\nsecond line")
    parts = tokenizer.encode("first line\n") + tokenizer.encode("second line", continued=True)
    assert whole == parts
    assert tokenizer.encode("second line") != tokenizer.encode("second line", continued=True)
    pieces = enumerate(tokenizer.pieces)
    number, piece = next((n, p) for n, p in pieces if p[:1] == "\u2581" and p[1:].isalpha())
    assert tokenizer.stream().push(number) == piece[1:]
    assert tokenizer.stream(continued=True).push(number) == f" {piece[1:]}"


def test_begin_is_what_the_file_puts_before_a_text():
    made = json.loads(byte_level())
    template = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    single = [template, {"Sequence": {"id": "A", "type_id": 0}}]
    token = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    made["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, single[1]],
        "special_tokens": {"<|endoftext|>": token},
    }  # fmt: skip
    given = {**byte_level_files(), "tokenizer.json": json.dumps(made).encode()}
    assert JsonTokenizer(given, "t").begin == (0,)
    assert JsonTokenizer(byte_level_files(), "t").begin == ()
    config = json.dumps(CHATML_CONFIG | {"add_bos_token": True}).encode()
    with_begin = JsonTokenizer({**byte_level_files(), "tokenizer_config.json": config}, "t")
    assert (with_begin.begin, with_begin.bos_id) == ((1,), 1)


def test_what_the_library_says_only_of_a_text_is_an_error_too():
    made = json.loads(byte_level())
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    unnamed = {"type": "TemplateProcessing", "single": single, "pair": [*single, single[1]]}
    values = {**made, "post_processor": {**unnamed, "special_tokens": {}}}
    given = {**byte_level_files(), "tokenizer.json": json.dumps(values).encode()}
    with pytest.raises(TokenizerError, match=r"^t: tokenizer\.json: cannot be used: "):
        JsonTokenizer(given, "t")
    model = {
        "type": "BPE",
        "unk_token": "none",
        "vocab": {"a": 0, "<|endoftext|>": 1},
        "merges": [],
    }
    without = {**made, "model": model, "pre_tokenizer": None, "added_tokens": []}
    given = {"tokenizer.json": json.dumps(without).encode()}
    given["tokenizer_config.json"] = json.dumps({"eos_token": "<|endoftext|>"}).encode()
    tokenizer = JsonTokenizer(given, "t")
    with pytest.raises(TokenizerError, match=r"^t: tokenizer\.json: cannot be used: Unk token"):
        tokenizer.encode("b")


def test_a_large_id_makes_no_long_list():
    made = json.loads(byte_level())
    made["model"]["vocab"]["far"] = len(made["model"]["vocab"]) + (1 << 17)
    given = {**byte_level_files(), "tokenizer.json": json.dumps(made).encode()}
    with pytest.raises(TokenizerError, match=r"ids of pieces must be numbers, of \d+ below \d+$"):
        JsonTokenizer(given, "t")


def test_a_component_that_is_spelled_as_a_list_is_read():
    made = json.loads(byte_level())
    made["normalizer"] = {"type": "Sequence", "normalizers": [["NFC"]]}
    given = {**byte_level_files(), "tokenizer.json": json.dumps(made).encode()}
    with suppress(TokenizerError):  # where the library does not take it
        assert JsonTokenizer(given, "t").encode("b", continued=True)


def test_tokens_of_other_files_are_added_with_their_ids():
    size = JsonTokenizer(byte_level_files(), "t").vocab_size
    added = {"added_tokens.json": json.dumps({"<think>": size}).encode()}
    tokenizer = JsonTokenizer({**byte_level_files(), **added}, "t")
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a<think>")[-1] == size
    wrong = {"added_tokens.json": json.dumps({"<think>": size + 5}).encode()}
    message = rf"the added token '<think>' has id {size + 5} in its file, and {size} by its place"
    with pytest.raises(TokenizerError, match=message):
        JsonTokenizer({**byte_level_files(), **wrong}, "t")


def test_unigrams_take_no_special_token_from_a_text():
    tokenizer = from_spm("unigram")
    assert not set(tokenizer.special_tokens.values()) & set(tokenizer.encode("a <s> b </s> <unk>"))
    assert tokenizer.encode("<s>", special=True)[-1:] == [1]
    own = reference(spm("unigram"))
    for line in lines():
        # The library takes that text for the byte piece, and of equally probable pieces of a run
        # of spaces others.
        if "<0x" not in line and "  " not in line:
            assert tokenizer.encode(line) == own.encode(line), line


def test_padding_and_truncation_of_a_file_change_no_id():
    made = json.loads(byte_level())
    made["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0}
    made["truncation"]["direction"] = "Right"
    made["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    given = {**byte_level_files(), "tokenizer.json": json.dumps(made).encode()}
    plain = JsonTokenizer(byte_level_files(), "t")
    for text in ("a", "some words of a text"):
        assert JsonTokenizer(given, "t").encode(text) == plain.encode(text)


def test_the_vocabulary_digest_is_that_of_the_pieces_alone():
    from_json = from_spm()
    assert (
        from_json.vocabulary_digest == from_files({"tokenizer.model": spm()}, "t").vocabulary_digest
    )
    assert from_json.vocabulary_digest != JsonTokenizer(byte_level_files(), "t").vocabulary_digest


def test_threads_with_and_without_special_tokens_do_not_mix(bytes_tokenizer):
    text = "<|im_start|>a word<|im_end|>" * 20
    expected = {special: bytes_tokenizer.encode(text, special=special) for special in (True, False)}
    assert expected[True] != expected[False]
    wrong = []

    def work(special):
        for _ in range(200):
            wrong.extend([1] * (bytes_tokenizer.encode(text, special=special) != expected[special]))

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


BROKEN = {
    b"{": "t: tokenizer.json: not JSON, so damaged: ",
    b"[]": "t: tokenizer.json: ",
    b"{}": "t: tokenizer.json: holds no model with a vocabulary",
    b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}': "a model of type 'WordPiece', must be",
    b'{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}': "the ids of pieces must be",
    b'{"model": {"type": "BPE", "vocab": {"a": 1152921504606846976}, "merges": []}}': "must be",
    b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}': "cannot be used: ",
    b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 7}}': "cannot be used: ",
    b'{"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}}': "cannot be used: ",
    b'{"model": {"type": "Unigram", "vocab": [1, 2]}}': "vocab: must be [piece, score] each",
    b'{"model": {"type": "Unigram", "vocab": [[[], 1.0]]}}': "vocab: must be [piece, score] each",
    b'{"model": {"type": "Unigram", "vocab": [[], {}]}}': "vocab: must be [piece, score] each",
    b'{"model": {"vocab": {}, "a": [' + b"[]," * 1_600_000 + b"[]]}}": "more values than any",
    b'{"model": {"vocab": {' + b'"a":1,' * 1_000_001 + b'"b":1}}}': "more values than any",
    b'{"added_tokens": [{"content": "a"}], "model": {"vocab": {}}}': "id None: must be 0 or more",
    b'{"added_tokens": 7, "model": {"vocab": {}}}': "t: tokenizer.json: ",
    b"[" * 100_000: "t: tokenizer.json: ",
}


@pytest.mark.parametrize("data", BROKEN, ids=lambda data: data[:50].decode())
def test_a_damaged_file_is_one_line_that_names_it(data):
    with pytest.raises(TokenizerError) as caught:
        JsonTokenizer({**byte_level_files(), "tokenizer.json": data}, "t")
    assert BROKEN[data] in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_whose_bytes_changed_is_refused_or_read():
    """A thousand faults: one line, never another exception."""
    drawn, whole = random.Random(1), byte_level()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(drawn.randint(1, 30)):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        try:
            JsonTokenizer({**byte_level_files(), "tokenizer.json": bytes(data)}, "t").encode("a b")
        except TokenizerError as error:
            assert "\n" not in str(error)


def test_without_a_name_for_the_end_the_message_says_where_one_is():
    with pytest.raises(TokenizerError) as caught:
        JsonTokenizer({"tokenizer.json": byte_level()}, "t")
    assert str(caught.value).startswith("t: no file names the token that ends a text: ")


def test_a_file_is_opened_with_those_beside_it(tmp_path):
    folder = write_files_of(byte_level_files(), tmp_path / "model")
    alone = open_tokenizer(folder / "tokenizer.json")
    assert alone.fingerprint == open_tokenizer(folder).fingerprint
    assert alone.files == byte_level_files()


def test_a_text_that_utf_8_cannot_hold_is_refused(bytes_tokenizer):
    with pytest.raises(TokenizerError, match=r"U\+D800 at character 2, which UTF-8 cannot"):
        bytes_tokenizer.encode("ab\ud800")
    with pytest.raises(TokenizerError, match=f"must be 0 to {bytes_tokenizer.vocab_size - 1}"):
        bytes_tokenizer.decode([bytes_tokenizer.vocab_size])


def test_the_library_is_imported_when_it_is_used():
    code = (
        "import sys, tinyllama.tokenizers.opening, tinyllama.data.corpus, tinyllama.cli.generate;"
        "assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
