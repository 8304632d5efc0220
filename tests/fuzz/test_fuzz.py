"""The fuzzer's kept inputs, once more, by its rules; what it once found, by name; and the rules."""

import json
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")

import targets
from parsers import Judge

from tinyllama.errors import DataError, TokenizerError
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets set variables of caches."""
    for name in ("XDG_CACHE_HOME", "TINYLLAMA_KERNEL_CACHE"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_kept_input_is_refused_or_read_by_the_rules(name: str) -> None:
    judge = Judge(name)
    inputs = [*targets.seeds(name), *(f.read_bytes() for f in sorted(CORPUS.glob(f"{name}/*")))]
    for data in [*inputs, b"", b"\0", b"{}", b"[]"]:
        wrong = judge.problem(data)
        assert wrong is None, (wrong, data[:200])


@pytest.mark.parametrize("name", sorted(targets.JSON))
def test_odd_values_in_json_are_refused_or_read_by_the_rules(name: str) -> None:
    """Each of a seed's values replaced by each odd one, without the fuzzer."""
    from parsers import ODD

    judge = Judge(name)
    value = json.loads(targets.seeds(name)[0])
    keys = [key for key in value if key != "model"][:12]
    for key in keys:
        for odd in ODD:
            data = json.dumps(value | {key: odd}).encode()
            assert judge.problem(data) is None, (key, odd, judge.problem(data))


def test_a_piece_that_is_not_utf8_is_a_damaged_model() -> None:
    model = targets.tokenizer().model
    piece = next(p for p in targets.tokenizer().pieces[260:] if len(p) == 2).encode()
    damaged = model.replace(piece, b"\xe2" + piece[1:], 1)
    assert damaged != model
    with pytest.raises(TokenizerError, match=r"^name: damaged: a piece that is not UTF-8$"):
        SentencePieceTokenizer(damaged, "name")


def test_a_model_without_an_unknown_piece_is_damaged() -> None:
    model = (CORPUS / "tokenizer_model" / "found-no-unknown").read_bytes()
    with pytest.raises(TokenizerError, match=r"^name: damaged: none of its pieces is the unknown"):
        SentencePieceTokenizer(model, "name")


def test_a_post_processor_that_leaves_no_text_is_refused() -> None:
    from tinyllama.tokenizers.opening import from_files

    held = targets.tokenizer().files
    values = json.loads(held["tokenizer.json"])
    values["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [],
                                "special_tokens": {}}  # fmt: skip
    files = {**held, "tokenizer.json": json.dumps(values).encode()}
    del files["tokenizer.model"]
    with pytest.raises(TokenizerError, match=r"^name: post_processor: must put tokens around"):
        from_files(files, "name")


def test_a_name_on_disk_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    from tinyllama.data.files import find_sources, read_texts

    (tmp_path / "a\x1b[31mb.jsonl").write_bytes(b"nothing\n")
    with pytest.raises(DataError) as caught:
        list(read_texts(find_sources(str(tmp_path))))
    assert "a\\x1b[31mb.jsonl" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_judge_sees_what_breaks_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def slow() -> None:
        end = time.process_time() + 2.1
        while time.process_time() < end:
            pass

    def failing(error: Exception) -> None:
        raise error

    acts = {
        b"KeyError": lambda: failing(KeyError("x")),
        b"long": lambda: failing(DataError("x" * 5000)),
        b"empty": lambda: failing(DataError("")),
        b"slow": slow,
        b"fine": lambda: None,
    }
    monkeypatch.setitem(targets.TARGETS, "odd", lambda folder: lambda data: acts[data]())
    judge = Judge("odd")
    found = {word.decode(): judge.problem(word) for word in acts}
    assert found.pop("fine") is None
    assert all((wrong or "").startswith(word) for word, wrong in found.items()), found
