"""Formats by what a file holds: rows are rows in whatever container and under whatever name."""

import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
from data_helpers import LINE, documents, load, run_python, small_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data import corpus, files, json_array
from tinyllama.data.detect import HEAD_BYTES, detect
from tinyllama.errors import DataError
from tinyllama.tokenizers.tokenizer import Tokenizer, write_files

TEXTS = ["one", 'two "quoted", [x] {y}', "three\r\nlines\n", "  é😀\\ \0", "", "]}", " "]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def objects(texts: list[str]) -> list[dict[str, object]]:
    return [{"id": number, "text": text, "tags": ["a", {"b": "]"}]} for number, text in
            enumerate(texts)]  # fmt: skip


def lines(texts: list[str], ensure_ascii: bool = True) -> str:
    return "".join(json.dumps(o, ensure_ascii=ensure_ascii) + "\n" for o in objects(texts))


def table(texts: list[str], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text"], *([number, text] for number, text in enumerate(texts))])
    return out.getvalue()


def containers(texts: list[str]) -> dict[str, str]:
    """The same rows as people have them."""
    return {
        "rows.jsonl": lines(texts),
        "ROWS.JSONL": lines(texts),
        "rows.ndjson": lines(texts, ensure_ascii=False),
        "lines.json": lines(texts),
        "rows.jsonl.txt": lines(texts, ensure_ascii=False),
        "rows": "\n \n" + lines(texts),
        "array.json": json.dumps(objects(texts)),
        "pretty.json": json.dumps(objects(texts), indent=2, ensure_ascii=False) + "\n\n",
        "array.jsonl": json.dumps(objects(texts)),
        "array.txt": json.dumps(objects(texts), indent=0),
        "bom.json": "\ufeff \n" + json.dumps(objects(texts)),
        "rows.csv": table(texts),
        "bom.csv": "\ufeff" + table(texts),
        "rows.tsv": table(texts, "\t"),
    }


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1, 60])
def test_rows_are_read_from_every_container(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    for name, data in containers(TEXTS).items():
        write(name, data)
        dataset = load(tokenizer, name)
        assert documents(dataset, tokenizer) == [text for text in TEXTS if text], name
        assert (dataset.n_documents, dataset.n_empty) == (6, 1), name


def test_a_folder_of_them_is_read_by_name(tokenizer: Tokenizer) -> None:
    for name, data in containers(["a", "b"]).items():
        write(f"d/{name}", data)
    write("d/z.txt", "prose")
    write("d/skipped.md", "x")
    assert documents(load(tokenizer, "d"), tokenizer) == [*["a", "b"] * 13, "prose"]


@pytest.mark.parametrize(
    "text",
    [
        "{curly} prose",
        "{}\nprose",
        '{"a": 1}\nThis is how an object looks.',
        '{\n  "a": 1\n}\n',
        "[1] a footnote",
        "[] and {}",
        '["a", "b"]',
        '"quoted", prose',
        "text,label\nof a table, in prose\n",
        "{" * 100_000,
    ],
)
def test_prose_stays_prose(tokenizer: Tokenizer, text: str) -> None:
    write("a.txt", text)
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [text]


def test_rows_longer_than_what_is_looked_at_are_rows(tokenizer: Tokenizer) -> None:
    text = "word " * HEAD_BYTES
    write("a.txt", lines([text, "b"]))
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [text, "b"]
    assert detect(Path("a.txt"), b'{"text": "a"}\n' + b'{"text": "' + b"x" * HEAD_BYTES) == "jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt", "lines.json"])
def test_a_bad_row_of_messages_is_named_in_lines(tokenizer: Tokenizer, name: str) -> None:
    write(name, '{"messages": []}\n{"messages": []}\n')
    with pytest.raises(DataError) as error:
        load(tokenizer, name)
    assert str(error.value) == f'{name}, line 1: "messages" is empty'


@pytest.mark.parametrize("name", ["alpaca.json", "a.jsonl", "a.txt"])
def test_rows_of_another_kind_are_refused_in_an_array(tokenizer: Tokenizer, name: str) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"instruction": "a", "input": "", "output": "b"}]
    write(name, json.dumps(rows, indent=1))
    with pytest.raises(DataError) as error:
        load(tokenizer, name)
    assert str(error.value) == (
        f"{name}, row 3, line 8: no \"text\"; keys found: 'instruction', 'input', 'output'; "
        'the file begins with rows that have "text": rows with "instruction" and "output" belong '
        "into a file of their own"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", "[]", "a.json: no text in it, 0 empty rows or files"),
        ("a.json", ' [ {"text": ""} ] ', "a.json: no text in it, 1 empty rows or files"),
        ("a.json", '["a"]', 'a.json, row 1, line 1: must be an object {"text": ...}, got str'),
        ("a.json", '[{"text": "a"},]', "row 2, line 1: not valid JSON: Expecting value, column 1"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "row 2, line 2: not valid JSON: Expecting"),
        ("a.json", '[{"text":\n\n b}]', "line 1: not valid JSON: Expecting value, line 3 of the"),
        ("a.json", '[{"text": 3}]', 'row 1, line 1: "text" must be a string, got int'),
        ("a.json", '[{"text": "a"}, {"te', "the JSON array does not end: the file stops within"),
        ("a.json", '[{"text": "a"}]\n[', "more text follows the end of the JSON array"),
        ("a.json", '[{"text": "a"]]', "row 1, line 1: not valid JSON: Expecting ',' delimiter"),
        ("a.json", '[{"text": "a"]]]', "more text follows the end of the JSON array"),
        ("a.json", "[" + "[" * 9999 + "]" * 10000, "a.json, row 1, line 1: nested too deeply"),
        ("a.json", '{\n"text": "a"}', "put each row on a line of its own, or all of them into one"),
        ("a.json", '{"data": []}', "a.json, line 1: no \"text\"; keys found: 'data'"),
        ("a.csv", "id,body\n1,a\n", "a.csv, line 1: no column \"text\"; columns: 'id', 'body'"),
        ("a.csv", "prompt,completion\n", "a.csv: no text in it, 0 empty rows or files"),
        ("a.csv", "id;text\n1;a\n", "no column \"text\"; columns: 'id;text'; name the column"),
        ("a.csv", "id,text\n1,a, b\n", "line 2: 3 columns, the header has 2: put a text with"),
        ("a.csv", 'text\n"a\nb"\n\nc,d\n', "a.csv, line 5: 2 columns, the header has 1"),
        ("a.csv", 'text\na\n"b', "a.csv, line 3: not valid CSV: unexpected end of data"),
        ("a.csv", 'text\n"a"b\n', "a.csv, line 2: not valid CSV: ',' expected after '\"'"),
        ("a.csv", "text\n", "a.csv: no text in it, 0 empty rows or files"),
        ("a.csv", b"text\n\xe9\n", "a.csv, line 2: byte 5 (0xe9) is not UTF-8"),
        ("a.json", b'[{"text": "\xe9"}]', "a.json, line 1: byte 11 (0xe9) is not UTF-8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4])
def test_what_cannot_be_read_is_named_with_its_place(
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: str | bytes,
    message: str,
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    write(name, data)
    with pytest.raises(DataError) as error:
        load(tokenizer, name)
    assert message in str(error.value)
    assert str(error.value).startswith(name)


@pytest.mark.parametrize(
    ("data", "what", "advice"),
    [
        (b"\xfd7zXZ\0\0", "compressed with xz", "decompress it first: xz -dk 'a file'"),
        (b"BZh9", "compressed with bzip2", "decompress it first: bunzip2 -k 'a file'"),
        (b"PK\x03\x04", "a zip archive", "unpack it first: unzip 'a file'"),
        (
            b"ARROW1\0\0",
            "an Arrow file",
            "convert it to JSON Lines first, with pandas: read_feather(FILE).to_json(NEW,"
            ' orient="records", lines=True)',
        ),
    ],
)
def test_what_must_be_converted_first_is_named_with_the_command(
    tokenizer: Tokenizer, data: bytes, what: str, advice: str
) -> None:
    write("a file", data)
    write("d/a.txt", data)
    with pytest.raises(DataError) as error:
        load(tokenizer, "a file", "d", "nothing.txt")
    first, second, third = str(error.value).splitlines()
    assert first == f"a file: is {what}, which is not read; {advice}"
    assert second.startswith(f"d/a.txt: is {what}, which is not read; ")
    assert third == "nothing.txt: no such file or folder"


@pytest.mark.parametrize("name", ["array.json", "rows.csv", "rows.jsonl.txt"])
def test_tokens_do_not_depend_on_the_number_of_workers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 150)
    write(name, containers([f"{LINE} {number}\n" for number in range(60)])[name])
    one = load(tokenizer, name)
    kept = one.tokens.tobytes()
    assert len(list(files.cut(files.find_sources(name)[0]))) > 10
    shutil.rmtree("cache")
    many = load(tokenizer, name, workers=3)
    assert many.tokens.tobytes() == kept
    assert (many.n_documents, many.path) == (60, one.path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_far_inside_is_found_by_its_place(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    rows: list[object] = [{"text": "word " * (number % 30)} for number in range(60)]
    write("a.json", json.dumps([*rows, {"txt": ""}, *rows, 1], indent=1))
    with pytest.raises(DataError, match=r'^a\.json, row 61, line 182: no "text"; keys found: .txt'):
        load(tokenizer, "a.json", workers=workers)
    write("a.csv", 'text\n"a\nb"\n' + "c\n" * 60 + "c,d\n" + "e\n" * 60)
    with pytest.raises(DataError, match=r"^a\.csv, line 64: 2 columns, the header has 1"):
        load(tokenizer, "a.csv", workers=workers)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},:é😀\n')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(VALUES),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    block=st.integers(1, 20),
    chunk_bytes=st.integers(1, 60),
)
def test_rows_of_an_array_are_those_that_json_finds(
    values: list[object], indent: int | None, ascii_only: bool, block: int, chunk_bytes: int
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_BLOCK_BYTES", block)
        ends = list(json_array.row_ends(io.BytesIO(data), 1 << 20))
    assert len(ends) == max(len(values), 1) and ends[-1] == len(data)
    starts = [0]
    for end in ends:  # as files.cut does
        if end - starts[-1] >= chunk_bytes or end == len(data):
            starts.append(end)
    parts = [data[a:b] for a, b in itertools.pairwise(starts)]
    found = [row for k, part in enumerate(parts) for row in json_array.rows(part, k == 0)]
    assert [json.loads(row) for _, row in found] == values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("array.json", r"^array\.json: row 2 is longer than 1000 bytes$"),
        ("rows.csv", r"^rows\.csv, line 3: a row is longer than 1000 bytes; is a quote missing\?$"),
    ],
)
def test_a_row_past_the_limit_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_array, "_BLOCK_BYTES", 100)
    write(name, containers(["x" * 900, "y" * 2000])[name])
    with pytest.raises(DataError, match=message):
        load(tokenizer, name)


def test_a_file_that_shrinks_while_it_is_cut_was_changed(tokenizer: Tokenizer) -> None:
    for name in ("array.json", "rows.csv"):
        path = write(name, containers(["a" * 100, "b"])[name])
        (source,) = files.find_sources(name)
        path.write_text(path.read_text()[:30])
        with pytest.raises(DataError, match=f"^{name}: the file was changed while it was being"):
            list(files.cut(source))


def test_tokens_of_earlier_versions_count(tokenizer: Tokenizer) -> None:
    """The key of prose and of JSON Lines is what it was before other formats were read: a
    checkpoint's place in the data names it."""
    write("a.txt", "prose")
    write("b.jsonl", ["row"])
    sources = files.find_sources(["a.txt", "b.jsonl"])
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.msgspec.json, "encode", lambda value: seen.append(value) or b"")
        corpus._make_key(["1", "2"], sources, tokenizer)
    assert seen == [[1, tokenizer.fingerprint, [(False, "1"), (True, "2")]]]
    assert tokenizer.ids_version == 1  # 2: of a normalizer whose long texts had other ids


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks the Linux kernel")
def test_memory_does_not_grow_with_an_array_or_a_table(tokenizer: Tokenizer) -> None:
    line = "some words of text and code\n"
    for name, rows in (("small", 40), ("large", 300)):
        write(f"{name}.json", json.dumps([{"text": line * 1000}] * rows, indent=1))
        write(f"{name}.csv", table([line * 1000] * rows))
    write_files(tokenizer, ".")
    process = run_python("""
        from pathlib import Path
        from tinyllama.data import batches, files
        from tinyllama.tokenizers.opening import open_tokenizer
        files.CHUNK_BYTES = 1 << 16
        tokenizer = open_tokenizer(".")
        for name in ("small.json", "small.csv", "large.json", "large.csv"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            batches.prepare(name, tokenizer, "cache", workers=1, progress=False)
            print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """)
    *small_kib, json_kib, csv_kib = map(int, process.communicate()[0].split())
    growth_bytes = (max(json_kib, csv_kib) - max(small_kib)) * 1024
    assert growth_bytes < Path("large.csv").stat().st_size / 3, (small_kib, json_kib, csv_kib)
