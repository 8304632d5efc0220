"""What is read of files, folders and globs, how it is cut, and the messages where it cannot be."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_helpers import LINE, documents, load, small_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data import corpus, files
from tinyllama.data.files import find_sources, read_texts
from tinyllama.errors import DataError
from tinyllama.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_text_file_is_one_document_and_each_row_is_one(tokenizer: Tokenizer) -> None:
    texts = ["first\r\nline\t ", "  é😀\0", " "]
    write("a.txt", "one\n\ntwo  \r\n")
    write("b.jsonl", texts)
    dataset = load(tokenizer, "a.txt", "b.jsonl")
    assert documents(dataset, tokenizer) == ["one\n\ntwo  \r\n", *texts]
    assert dataset.n_documents == 4
    assert dataset.text_bytes == sum(len(text.encode()) for text in ["one\n\ntwo  \r\n", *texts])
    assert dataset.n_tokens == len(dataset.tokens)
    assert dataset.tokens.dtype == np.uint16


def test_a_large_vocabulary_takes_four_bytes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.txt", LINE)
    small = load(tokenizer, "a.txt").tokens.tolist()
    shutil.rmtree("cache")
    monkeypatch.setattr(tokenizer, "vocab_size", 65537)
    large = load(tokenizer, "a.txt").tokens
    assert large.dtype == np.uint32
    assert large.tolist() == small


@pytest.mark.parametrize("train", ["train.txt", "train.jsonl"])
@pytest.mark.parametrize("held_out", ["val.txt", "valid.jsonl", "validation.txt", "test.TXT"])
def test_a_folder_with_held_out_text_beside_the_training_text_is_refused(train, held_out) -> None:
    for name in (train, held_out):
        write(f"both/{name}", LINE if name.lower().endswith("txt") else [LINE])
    with pytest.raises(DataError) as caught:
        files.find_sources("both")
    assert str(caught.value) == f"both: holds {train} and {held_out}: name the one to read"
    write("alone/sub/val.txt", LINE)
    write("alone/train.txt", LINE)
    assert len(files.find_sources("alone")) == 2  # a folder below it is not looked into


def test_folders_and_globs_are_read_by_name_and_each_file_once(tokenizer: Tokenizer) -> None:
    for name in ["d/b.txt", "d/a/z.JSONL", "d/x.py", "d/a/y.py", "d/skipped.md"]:
        write(name, [name] if name.endswith("JSONL") else name)
    expected = {
        ("d",): ["d/a/z.JSONL", "d/b.txt"],
        ("d/*.py",): ["d/x.py"],
        ("d/**/*.py",): ["d/a/y.py", "d/x.py"],
        ("d/b.txt", "d", "d/../d/b.txt"): ["d/b.txt", "d/a/z.JSONL"],
        ("d/x.py", "d/*.[mt]*"): ["d/x.py", "d/b.txt", "d/skipped.md"],
    }
    for patterns, names in expected.items():
        assert documents(load(tokenizer, *patterns), tokenizer) == names, patterns


def test_a_name_that_looks_like_a_glob_is_taken_as_a_name(tokenizer: Tokenizer) -> None:
    write("a[1].txt", "named")
    write("a1.txt", "matched")
    assert documents(load(tokenizer, "a[1].txt"), tokenizer) == ["named"]


def test_byte_order_marks_and_blank_lines_are_not_text(tokenizer: Tokenizer) -> None:
    write("a.txt", "\ufefftext \ufeff")
    write("b.jsonl", '\ufeff{"text": "one"}\r\n\n  \n{"text": "two", "n": NaN}')
    dataset = load(tokenizer, "a.txt", "b.jsonl")
    assert documents(dataset, tokenizer) == ["text \ufeff", "one", "two"]
    assert dataset.text_bytes == len("text \ufeff".encode()) + 6


def test_empty_rows_and_empty_files_of_a_folder_are_left_out_and_counted(
    tokenizer: Tokenizer,
) -> None:
    write("d/a.jsonl", ["", "text", ""])
    write("d/b.txt", "")
    dataset = load(tokenizer, "d")
    assert documents(dataset, tokenizer) == ["text"]
    assert (dataset.n_documents, dataset.n_empty) == (1, 3)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "", "a.txt: the file is empty"),
        (
            "a.txt",
            b"ab\n\xff\xfe",
            "a.txt, line 2: byte 3 (0xff) is not UTF-8; convert",
        ),
        ("a.jsonl", "\n \n", "a.jsonl: no text in it, 0 empty rows or files"),
        ("a.jsonl", ["", ""], "a.jsonl: no text in it, 2 empty rows or files"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl, line 1: byte 10 (0xe9) is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": b}\n', "a.jsonl, line 3: not valid JSON: Expecting"),
        ("a.jsonl", '{"text": "a"}\n["a"]', 'line 2: must be an object {"text": ...}, got list'),
        ("a.jsonl", "[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", '{"a":' + "[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", '{"text": 3}', 'line 1: "text" must be a string, got int'),
        ("a.jsonl", r'{"text": "\ud800"}', 'line 1: "text" holds half of a surrogate pair'),
        ("a.jsonl", "{}", 'a.jsonl, line 1: no "text"; keys found: none'),
        ("a.jsonl", '{"id": 1, "body": ""}', "no \"text\"; keys found: 'id', 'body'"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            "line 2: no \"text\"; keys found: 'prompt', 'completion'; the file begins with rows"
            ' that have "text": rows with "prompt" and "completion" belong into a file of',
        ),
        ("a.jsonl", '{"messages": []}', 'a.jsonl, line 1: "messages" is empty'),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(
    tokenizer: Tokenizer, name: str, data: str | bytes | list[str], message: str
) -> None:
    write(name, data)
    with pytest.raises(DataError) as error:
        load(tokenizer, name)
    assert message in str(error.value)
    assert str(error.value).startswith(name)
    assert not list(Path("cache").glob(".*"))


KEYS = (
    '; a row of conversations has "messages", "conversations", "chosen" and "rejected", '
    '"prompt" and "completion", "instruction" and "output"'
)


def test_a_row_of_no_kind_says_what_rows_have(tokenizer: Tokenizer) -> None:
    write("a.jsonl", '{"id": 1}')
    with pytest.raises(DataError) as error:
        load(tokenizer, "a.jsonl")
    assert str(error.value) == f"a.jsonl, line 1: no \"text\"; keys found: 'id'{KEYS}"


def test_everything_that_cannot_be_found_is_reported_at_once(tokenizer: Tokenizer) -> None:
    write("empty.txt", "")
    write("folder/other.md", "x")
    write("both/train.jsonl", ["x"])
    write("both/val.jsonl", ["x"])
    with pytest.raises(DataError) as error:
        load(tokenizer, "none.txt", "no*.txt", "fold*", "folder", "empty.txt", "both", "")
    assert str(error.value).splitlines() == [
        "none.txt: no such file or folder",
        "no*.txt: the glob matches nothing",
        "fold*: the glob matches only folders",
        "folder: the folder holds no .csv, .json, .jsonl, .ndjson, .tsv or .txt file",
        "empty.txt: the file is empty",
        "both: holds train.jsonl and val.jsonl: name the one to read",
        "a path is empty",
    ]


def test_nothing_but_empty_files_is_an_error(tokenizer: Tokenizer) -> None:
    write("d/a.txt", "")
    with pytest.raises(DataError, match=r"^d: all of its files are empty$"):
        load(tokenizer, "d")
    with pytest.raises(DataError, match="no files of text are named"):
        load(tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_far_inside_is_found_by_its_line(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    rows = [json.dumps({"text": "word " * (number % 30)}) for number in range(60)]
    write("a.jsonl", "\n".join([*rows, '{"txt": ""}', *rows, "{"]))
    with pytest.raises(
        DataError, match=rf"^a\.jsonl, line 61: no \"text\"; keys found: 'txt'{KEYS}$"
    ):
        load(tokenizer, "a.jsonl", workers=workers)


def test_bad_utf8_far_inside_is_found_by_its_byte(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    write("a.txt", LINE.encode() * 30 + b"ab\xc3")
    with pytest.raises(DataError, match=rf"a\.txt, line 31: byte {len(LINE) * 30 + 2} \(0xc3\)"):
        load(tokenizer, "a.txt")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab é漢😀\n\r\t"), min_size=1), size=st.integers(4, 40))
def test_a_long_text_is_cut_without_loss_and_stays_one_document(
    tokenizer: Tokenizer, text: str, size: int
) -> None:
    path = write("cut.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", size)
        (source,) = files.find_sources("cut.txt")
        chunks = list(files.cut(source))
        texts = [text for chunk in chunks for text in files.read_chunk(chunk)]
        assert "".join(texts) == text
        assert all(chunk.end - chunk.start <= 2 * size + 3 for chunk in chunks)
        encoder = corpus._Encoder(tokenizer.sources, "uint16")
        parts = [encoder(chunk) for chunk in chunks]
    ids = np.concatenate([part.tokens for part in parts]).tolist()
    assert ids[0] == tokenizer.bos_id and ids.index(tokenizer.eos_id) == len(ids) - 1
    assert tokenizer.decode(ids) == text
    assert sum(len(part.starts) for part in parts) == 1
    assert sum(part.text_bytes for part in parts) == path.stat().st_size


def test_cuts_at_line_ends_leave_the_tokens_of_the_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (LINE + "\n    indented\n") * 50
    write("a.txt", text)
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    chunks = list(files.cut(files.find_sources("a.txt")[0]))
    assert len(chunks) > 10
    assert all(text[: chunk.end].endswith("\n") for chunk in chunks)
    assert load(tokenizer, "a.txt").tokens.tolist() == ids


def test_a_row_past_the_limit_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    write("a.jsonl", ["x" * 900, "y" * 2000])
    with pytest.raises(DataError, match=r"a\.jsonl: a row after byte \d+ is longer than 1000 b"):
        load(tokenizer, "a.jsonl")


def test_a_row_of_many_values_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """45 MB of brackets took 1.3 GB, and a message of 60 MB."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": 5, "x": [' + "[]," * 2_000_000 + "[]]}\n")
    tracemalloc.start()
    with pytest.raises(DataError, match="more than 1000000 values in one row") as error:
        list(read_texts(find_sources(str(file))))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 40e6 and len(str(error.value)) < 300 + len(str(file))
    file.write_text('{"' + "k" * 10**6 + '": 1, "\\u001b[2J": 1}\n')
    with pytest.raises(DataError, match="keys found") as error:
        list(read_texts(find_sources(str(file))))
    assert len(str(error.value)) < 300 + len(str(file)) and "\x1b" not in str(error.value)
