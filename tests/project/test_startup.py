"""The script that measures the time to the first loss, on a model that takes a second."""

import importlib
import re
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

startup = importlib.import_module("startup")

TINY = (
    "configs/124m.toml --set model.num_layers=1 --set model.vocab_size=512"
    " --batch 1 --context 32 --steps 2"
)


def test_new_processes_are_measured_with_warm_and_cold_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "startup.md"
    words = ["--runs", "1", "--gigabytes", "0", "--bench", TINY, "--out", str(out)]
    assert startup.main(words) == 0
    text = out.read_text()
    assert text.partition("\n\n")[2].strip() in capsys.readouterr().out
    found = dict(re.findall(r"^\| (warm|cold) \| not prepared \| ([\d.]+) \(", text, re.M))
    # Compiling a step's kernels takes seconds of processor time, so a cold cache is slower.

    assert float(found["cold"]) > float(found["warm"]) > 0
    assert f"`{TINY}`, by `tools/startup.py`" in text


def test_a_row_has_the_time_beyond_a_steady_step() -> None:
    runs = [
        {"first_loss_seconds": first, "second_step_seconds": 2.5, "step_seconds": 2.0}
        for first in (5.0, 9.0, 6.0)
    ]
    assert startup.row("warm", 5, runs) == (
        "| warm | 5 GB allocated and freed before | 4.0 (3.0 to 7.0) | 0.5 |"
    )
    assert startup.row("cold", 0, runs[:1]) == "| cold | not prepared | 3.0 (3.0 to 3.0) | 0.5 |"
