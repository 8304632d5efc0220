"""SentencePiece models as LLaMA uses them: ids, exact round trips, streams, training, errors."""

import hashlib
import importlib.util
import io
import itertools
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers import cutting
from tinyllama.tokenizers import sentencepiece as module
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer as Spm
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import write_files

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading",
    "trailing ",
    "two  spaces   three",
    "\tdef f(x):\n\t\treturn  x\n",
    "line\r\nline\r\n\r\n",
    "\n\n\n",
    "2024-11-22 costs 1234.50",
    "naïve 漢字 и Ω 👩‍👩‍👧 🇨🇭",
    "a\0b\x01\x7f",
    "\ufeffmark",
    "<s>not special</s> <unk> <0x0A>",
]
CODE = "def add(first, second):\n    return first + second  # 123\n\n\n" * 40


@pytest.fixture(scope="module")
def llama_file() -> Path:
    """A real LLaMA-style model of 32000 pieces, found without importing its package."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common, which brings a real tokenizer.model, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def llama(llama_file: Path) -> Spm:
    return open_tokenizer(llama_file)


@pytest.fixture(scope="module")
def trained() -> Spm:
    return train_tokenizer([CODE, *TEXTS], 330)


def make_model(**changes: object) -> bytes:
    """A SentencePiece model trained without our settings."""
    written = io.BytesIO()
    arguments: dict[str, object] = {"model_type": "bpe", "vocab_size": 40, "minloglevel": 2}
    lines = iter(["a few plain words"] * 3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=written, **(arguments | changes)
    )
    return written.getvalue()


def test_a_llama_model_works_as_it_is(llama: Spm, llama_file: Path) -> None:
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (32000, 1, 2)
    assert llama.fingerprint == hashlib.sha256(llama_file.read_bytes()).hexdigest()
    assert llama.encode("Hello world") == [22557, 1526]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(llama: Spm, llama_file: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert llama.encode(text) == reference.encode(text)


def test_a_long_text_gives_the_ids_of_the_uncut_text(llama: Spm, llama_file: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    text = Path(__file__).read_text(encoding="utf-8").replace("\u2581", "") * 3
    assert len(text) > 3 * module._LINES_CHARS
    assert llama.encode(text) == reference.encode(text)


def test_text_without_line_ends_is_cut_at_the_longest_piece(
    trained: Spm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "LONGEST_CHARS", 100)
    monkeypatch.setattr(trained, "_cut_chars", 50)
    text = "word " * 200
    assert max(map(len, cutting.cut(text, 50))) == 100
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, "a\u2581b", "\u2581", "\u2581 x", " \u2581", CODE])
def test_every_text_survives(llama: Spm, trained: Spm, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text
    assert trained.decode(trained.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\r\0\u2581a")))
def test_any_text_survives_streaming(trained: Spm, text: str) -> None:
    ids = trained.encode(text)
    stream = trained.stream()
    assert "".join([stream.push(piece) for piece in ids]) + stream.flush() == text
    assert not {trained.bos_id, trained.eos_id} & set(ids)


def test_a_continued_text_gets_no_space_before_its_first_word(
    llama: Spm,
) -> None:
    whole = llama.encode("first line\nsecond line")
    parts = llama.encode("first line\n") + llama.encode("second line", continued=True)
    assert whole == parts
    assert llama.encode("second line") != llama.encode("second line", continued=True)


def test_a_character_is_held_back_until_it_is_whole(llama: Spm) -> None:
    ids = llama.encode("a𓀀b")
    stream = llama.stream()
    assert [stream.push(piece) for piece in ids] == ["a", "", "", "", "𓀀", "b"]


def test_what_never_becomes_a_character_is_shown(llama: Spm) -> None:
    first = llama.encode("𓀀", continued=True)[:2]
    assert llama.decode(first) == "\ufffd\ufffd"
    assert llama.decode([*first, *llama.encode("b", continued=True)]) == "\ufffd\ufffdb"


def test_decoding_agrees_with_sentencepiece(llama: Spm, llama_file: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    chosen = random.Random(7)
    for _ in range(3000):
        ids = [chosen.choice([chosen.randrange(300), chosen.randrange(32000)]) for _ in range(6)]
        assert llama.decode(ids) == reference.decode(ids), ids


def test_a_continued_stream_keeps_the_space_of_its_first_word(
    llama: Spm,
) -> None:
    (world,) = llama.encode("world")
    assert llama.stream().push(world) == "world"
    assert llama.stream(continued=True).push(world) == " world"


def test_saving_and_loading_keeps_every_byte(trained: Spm, tmp_path: Path) -> None:
    write_files(trained, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.model"
    assert path.read_bytes() == trained.model
    for place in (path, path.parent):
        assert open_tokenizer(place).fingerprint == trained.fingerprint


def test_training_gives_llamas_special_ids_and_bytes(trained: Spm) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.id_to_piece(list(range(4))) == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert sum(model.is_byte(list(range(330)))) == 256
    assert trained.vocab_size == 330


def test_training_splits_digits_and_learns_runs_of_spaces(trained: Spm) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
    assert model.encode("    return", out_type=str)[:2] == ["▁▁", "▁▁▁"]
    assert model.encode("x123", out_type=str)[-3:] == ["1", "2", "3"]


def test_training_twice_gives_the_same_bytes_and_writes_them(tmp_path: Path) -> None:
    out = tmp_path / "new" / "t.model"
    first = train_tokenizer(iter([CODE]), 290, out)
    assert out.read_bytes() == first.model == train_tokenizer([CODE], 290).model


@pytest.mark.parametrize("reserved", ["\0", "\u2585", "\u2581"])
def test_training_skips_no_line_for_a_character_in_it(reserved: str) -> None:
    trained = train_tokenizer([f"{reserved} wonderful wonderful\n" * 50], 280)
    assert len(trained.encode("wonderful")) <= 2


def test_training_skips_no_part_of_a_long_line() -> None:
    trained = train_tokenizer(["x " * 3000 + "wonderful " * 50], 281)
    assert len(trained.encode("wonderful")) <= 2


def test_the_training_sample_is_bounded_and_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRAIN_CHARS", 1000)
    texts = [f"{number:09d}\n" for number in range(5000)]
    kept = module._sample(iter(texts))
    assert 500 <= sum(map(len, kept)) <= 1000
    assert kept == module._sample(texts)
    numbers = [int(text) for text in kept]
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    assert numbers == sorted(numbers)
    assert max(gaps) < 4 * 5000 / len(kept)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "cannot train a tokenizer: the texts are empty"),
        (
            ["abc"],
            2000,
            "vocab_size 2000: the texts give at most 269 pieces: set 269 or less, or train on more"
            " text",
        ),
        (
            ["abcdefgh"],
            262,
            "vocab_size 262: the characters in the texts alone need 268 pieces: set 268 or more",
        ),
    ],
)
def test_training_says_why_it_cannot(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(TokenizerError) as error:
        train_tokenizer(texts, vocab_size)
    assert str(error.value) == message


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    folder = tmp_path / "folder"
    folder.mkdir()
    tiktoken = tmp_path / "tiktoken.model"
    tiktoken.write_bytes(b"IQ== 0\nIg== 1\n")
    cases = {
        tiktoken: "a list of tiktoken's, as Meta's LLaMA 3 has it, which cannot be read: take the"
        " tokenizer.json of the same model in the Hugging Face form",
        tmp_path / "none.model": "none.model: no such file",
        junk: "junk.model: not a SentencePiece model (11 bytes)",
        folder: "folder: the folder holds neither tokenizer.model nor tokenizer.json",
    }
    for path, message in cases.items():
        with pytest.raises(TokenizerError) as error:
            open_tokenizer(path)
        assert str(error.value).endswith(message)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: holds no model with a vocabulary"):
        open_tokenizer(folder)


def test_a_model_without_an_end_is_refused_and_one_without_a_begin_is_not() -> None:
    with pytest.raises(TokenizerError, match="t: the model has no piece for the end of a text"):
        Spm(make_model(eos_id=-1), "t")
    without = Spm(make_model(bos_id=-1), "t")
    assert (without.bos_id, without.begin) == (None, ())


def test_a_model_without_dummy_space_or_bytes_is_read_as_it_is() -> None:
    plain = Spm(make_model(add_dummy_prefix=False, remove_extra_whitespaces=False))
    assert plain.decode(plain.encode(" few  words")) == " few  words"
    assert plain.encode("words") == plain.encode("words", continued=True)
    assert plain.decode(plain.encode("few\u2581words")) == "few words"  # no bytes to hold it


def test_ids_and_texts_out_of_range_are_refused(trained: Spm) -> None:
    for piece in (-1, 330):
        with pytest.raises(TokenizerError, match=f"token id {piece}: must be 0 to 329"):
            trained.decode([piece])
    with pytest.raises(TokenizerError, match=r"U\+D800 at character 2, which UTF-8 cannot"):
        trained.encode("ab\ud800")


# What spm_train does by default, and each half of it.
DEFAULTS: dict[str, object] = {"normalization_rule_name": "nmt_nfkc"}
LLAMAS: dict[str, object] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
}
NORMALIZERS = {
    "LLaMA's": LLAMAS,
    "spm_train's": DEFAULTS,
    "spaces merged": LLAMAS | {"remove_extra_whitespaces": True},
    "line ends become spaces": LLAMAS | DEFAULTS,
    "unigram": DEFAULTS | {"model_type": "unigram"},
    "no space before a text": LLAMAS | DEFAULTS | {"add_dummy_prefix": False},
    "spaces behind words": DEFAULTS | {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("line_end", ["\n", "\n    ", "\n\n", "\r\n", " \n ", "\n\t"])
@pytest.mark.parametrize("changes", NORMALIZERS.values(), ids=NORMALIZERS)
def test_a_long_text_has_the_ids_of_sentencepiece_with_every_normalizer(
    changes: dict[str, object], line_end: str
) -> None:
    """spm_train's own merges spaces and strips them: the words at a cut were glued together."""
    model = make_model(vocab_size=300, hard_vocab_limit=False, **changes)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = "a few plain words, some of a line, as words are".split()
    shuffled = random.Random(0)
    lines = [" ".join(shuffled.choices(words, k=8)) for _ in range(400)]
    text = line_end.join(lines)
    assert len(text) > 3 * module._LINES_CHARS
    assert Spm(model).encode(text) == reference.encode(text)


@pytest.mark.parametrize("name", ["LLaMA's", "spm_train's", "unigram"])
def test_a_text_that_continues_after_a_line_end_has_the_ids_of_the_whole(name: str) -> None:
    changes = {"vocab_size": 300, "hard_vocab_limit": False} | NORMALIZERS[name]
    tokenizer = Spm(make_model(**changes))
    first, second = "a few plain\n", "words\nas few\n"
    ids = tokenizer.encode(first) + tokenizer.encode(second, continued=True)
    assert ids == tokenizer.encode(first + second)
    assert tokenizer.ids_version == (1 if name == "LLaMA's" else 2)  # tokens kept on disk are old
