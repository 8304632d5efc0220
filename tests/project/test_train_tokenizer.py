"""The scripts that train a tokenizer and write the demo's corpus."""

import importlib
import json
import signal
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tinyllama.tokenizers.opening import open_tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"

demo_corpus = importlib.import_module("demo_corpus")
train_tokenizer = importlib.import_module("train_tokenizer")


def test_the_script_trains_a_tokenizer_that_loads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words of text\n" * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "other words of text"}\n' * 50)
    out = tmp_path / "out" / "t.model"
    done = subprocess.run(
        [sys.executable, TOOLS / "train_tokenizer.py", tmp_path, "--vocab-size=280", "--out", out],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    tokenizer = open_tokenizer(out)
    assert tokenizer.vocab_size == 280
    expected = f"{out}: 280 pieces from 2 files, 2550 bytes; sha256 {tokenizer.fingerprint}\n"
    assert done.stdout == expected
    assert "Reading" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("few", ["a.txt", "--vocab-size=5000"], "vocab_size 5000: the texts give at most"),
        ("few", ["none.txt"], "none.txt: no such file or folder"),
        ("", ["a.txt"], "a.txt: the file is empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(text)
    assert train_tokenizer.main([*arguments, "--out", "t.model"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train_tokenizer: {message}")
    assert not Path("t.model").exists()


def test_a_vocabulary_of_nothing_and_a_folder_in_the_way_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some words of text\n" * 50)
    with pytest.raises(SystemExit, match="2"):
        train_tokenizer.main(["a.txt", "--vocab-size", "0"])
    assert "--vocab-size: got '0', must be an integer of 1 or more" in capsys.readouterr().err
    Path("out").mkdir()
    assert train_tokenizer.main(["a.txt", "--vocab-size", "280", "--out", "out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "train_tokenizer: --out out: is a folder"


def test_an_interrupted_tool_exits_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 1_000_000)
    command = [sys.executable, TOOLS / "train_tokenizer.py", tmp_path / "a.txt"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None and process.stderr.read(1)  # its progress bar begins
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().endswith("interrupted\n")
    assert process.returncode == 130


def test_the_corpus_is_the_library_without_tests_and_a_twentieth_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "lib"
    names = [f"package/module_{number}.py" for number in range(200)]
    left_out = ["test/a.py", "lib2to3/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py"]
    for name in [*names, *left_out, "package/notes.txt"]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name} é\n", encoding="utf-8")
    (library / "empty.py").touch()
    (library / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (library / "broken.py").write_bytes(b"# \xff\n")

    demo_corpus.write_corpus(library, tmp_path / "out")

    found: dict[str, dict[str, str]] = {}
    for part in ("train", "val"):
        lines = (tmp_path / "out" / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        found[part] = {row["path"]: row["text"] for row in rows}
    assert set(found["train"]) | set(found["val"]) == {*names, "latin.py"}
    assert not set(found["train"]) & set(found["val"])
    assert 4 <= len(found["val"]) <= 18
    assert all(map(demo_corpus.is_held_out, found["val"]))
    assert (found["train"] | found["val"])["latin.py"] == "# coding: latin-1\n# é\n"
    printed = capsys.readouterr().out
    assert "left out, cannot be decoded: broken.py: " in printed
    assert "left out: 1 empty files, 1 that cannot be decoded" in printed
    val_bytes = sum(len(text.encode()) for text in found["val"].values())
    assert f"val.jsonl: {len(found['val'])} files, {val_bytes} bytes of text" in printed


def test_the_real_library_gives_megabytes_of_text(tmp_path: Path) -> None:
    assert demo_corpus.main([str(tmp_path)]) == 0
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").split("\n")
    train = [json.loads(line) for line in lines if line]
    assert sum(len(row["text"]) for row in train) > 5_000_000
    paths = {row["path"] for row in train}
    assert not any({"test", "tests", "site-packages"} & set(path.split("/")) for path in paths)
    by_path = {row["path"]: row["text"] for row in train}
    with tokenize.open(tokenize.__file__) as file:
        text = file.read()
    assert by_path.get("tokenize.py", text) == text
