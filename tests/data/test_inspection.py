"""tinyllama inspect, and data sets by their name on a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import small_tokenizer
from hub_server import Repository, serve
from runs_helpers import cli

from tinyllama.data.conversations import Form
from tinyllama.data.inspection import Totals, inspect, runs
from tinyllama.reports.inspection import html_page, terminal_row, terminal_totals
from tinyllama.tokenizers.tokenizer import write_files

TURNS = [
    {"role": "user", "content": "<b>q</b> \x1b[0m"},
    {"role": "assistant", "content": "a\u00e9"},
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of rows, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    long = {**TURNS[1], "content": "b" * 300}
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": [TURNS[0], long]}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b.json").write_text(json.dumps([{"prompt": "p", "completion": "c"}]))
    Path("c.jsonl").write_text(json.dumps({"text": "t" * 300}))
    write_files(small_tokenizer(), "tokenizer")
    return tmp_path


def test_json_has_an_object_per_row_in_order(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a.jsonl", "b.json", "c.jsonl", "--model", "tokenizer", "--template", "chatml"]
    assert cli("inspect", *words, "--context", "120", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [
        ("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 3), ("b.json", 1), ("c.jsonl", 1)
    ]  # fmt: skip
    assert all([*row] == ["file", "row", "ids", "trained", "truncated"] for row in rows)
    assert all(len(row["ids"]) == len(row["trained"]) for row in rows)
    assert [row["truncated"] for row in rows] == [False, False, True, False, False]
    assert len(rows[2]["ids"]) == 120 and not any(rows[1]["trained"])
    assert all(rows[4]["trained"]) and len(rows[4]["ids"]) > 120
    tokenizer = small_tokenizer()
    said = [i for i, on in zip(rows[0]["ids"], rows[0]["trained"], strict=True) if on]
    assert tokenizer.stream(continued=True).push(said[0]) == "a"
    assert tokenizer.decode(said).endswith("a\u00e9<|im_end|>")


def test_a_terminal_shows_what_is_trained_and_acts_on_nothing_in_it(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a.jsonl", "--model", "tokenizer", "--template", "chatml", "--context", "200"]
    assert cli("inspect", *words) == 0
    out = capsys.readouterr().out
    assert "\u27e6a\u00e9<|im_end|>\u27e7\n" in out and "\x1b" not in out and "\\x1b[0m" in out
    assert "row 2: " in out and "0 trained: left out" in out
    assert "3 rows, " in out and "1 rows cut off, 1 left out" in out


def test_colours_and_the_page_tell_trained_and_special_tokens_apart(files: Path) -> None:
    tokenizer, totals = small_tokenizer(), Totals()
    rows = [*inspect(["b.json"], tokenizer, Form(), 64)]
    totals.add(rows[0])
    shown = [*runs(rows[0], tokenizer)]
    assert [(run.text, run.trained, run.special) for run in shown] == [
        ("<s>", False, True), ("p", False, False), ("c", True, False), ("</s>", True, True)
    ]  # fmt: skip
    assert "\033[32mc\033[0m\033[7;32m</s>\033[0m" in terminal_row(rows[0], shown, colour=True)
    page = html_page([(rows[0], shown)], totals, "a <title>")
    assert "<span class='t'>c</span><span class='t s'>&lt;/s&gt;</span>" in page
    assert "a &lt;title&gt;" in page and "http" not in page and "data-points=1" in page
    assert terminal_totals(totals).splitlines()[-1].endswith("1")


def test_the_histogram_holds_every_row_once() -> None:
    totals = Totals()
    totals.lengths.update([3, 3, 10, 100])
    bars = totals.histogram(5)
    assert sum(rows for *_, rows in bars) == 4 and len(bars) <= 5
    assert bars[0][:2] == (3, 22) and bars[-1][1] == 100


def test_a_page_is_written_and_a_bad_row_ends_it(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tokenizer", "--template", "chatml", "--html", "page.html", "--rows", "2"]
    assert cli("inspect", "a.jsonl", *words) == 0
    page = Path("page.html").read_text()
    assert page.count("<pre>") == 2 and "&lt;b&gt;q&lt;/b&gt;" in page
    assert "2 of 3 rows" in capsys.readouterr().err
    Path("bad.jsonl").write_text(json.dumps({"messages": []}))
    assert cli("inspect", "bad.jsonl", *words) == 2
    assert capsys.readouterr().err == 'bad.jsonl, line 1: "messages" is empty\n'


CODE = """
import json, sys
from tinyllama.data.files import find_sources
from tinyllama.errors import TinyllamaError
try:
    print(json.dumps([source.path.name for source in find_sources(sys.argv[1])]))
except TinyllamaError as error:
    print(json.dumps(str(error)))
"""


def ask(name: str, address: str, cache: Path, **environment: str) -> object:
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE, name], env={**os.environ, **settings}, cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_data_set_on_the_hub_is_its_training_files(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "completion": "c"}).encode()
    names = ["README.md", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"]
    repository = Repository({"main": dict.fromkeys(names, row)})
    with serve({"datasets/some/chats": repository}) as address:
        assert ask("some/chats", address, tmp_path) == ["train-00000-of-00001.jsonl"]
        assert ask("some/chats:test", address, tmp_path) == ["test-00000-of-00001.jsonl"]
        assert "no file for the part" in str(ask("some/chats:dev", address, tmp_path))
        assert "no data set of that name" in str(ask("some/other", address, tmp_path))
    offline = ask("some/chats", address, tmp_path, HF_HUB_OFFLINE="1")
    assert offline == ["train-00000-of-00001.jsonl"]
