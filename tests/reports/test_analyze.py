"""What analyze says about runs whose oddities are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_helpers import cli, finished_run

from tinyllama.reports import analyze
from tinyllama.reports.analyze import document_lengths, findings
from tinyllama.reports.runs import read_run

pytest.importorskip("sklearn")


def write_run(folder: Path, seconds: Any, steps: int = 300, profile: Any = None) -> Path:
    """A run whose step number s takes seconds(s), with a checkpoint every 20 steps."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        time = seconds(step) * (1 + 0.01 * float(rng.random()))
        line = {"step": step, "loss": 3 + 0.05 * float(rng.random()), "lr": 1e-3, "epoch": 1}
        line |= {"grad_norm": 1 + 0.05 * float(rng.random()), "tokens_per_second": 256 / time}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.toml").write_text(
        "[model]\nmax_seq_len = 64\n[training]\nbatch_size = 4\n[checkpointing]\nsave_every = 20\n"
    )
    if profile is not None:
        (folder / "profile.json").write_text(json.dumps(profile))
    return folder


def test_steps_after_a_checkpoint_that_are_slower_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lambda s: 0.24 if (s - 1) % 20 == 0 else 0.1)
    lines = findings(read_run(folder))
    assert "steps right after a checkpoint are 2.4 times slower (14 steps)" in lines
    (outliers,) = [line for line in lines if "times the time" in line]
    assert outliers.startswith("14 steps (21, 41, 61, 81, 101, ...) have 2.4 times the time")
    assert "100% of them are steps right after a checkpoint, and 0% of the others" in outliers


def test_two_kinds_of_steps_are_two_groups(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lambda s: 0.3 if s % 3 == 0 else 0.1)
    groups = [line for line in findings(read_run(folder)) if line.startswith("group of")]
    assert len(groups) == 2
    # The first five steps wait for compilers: 99 of the other 295 are multiples of three.
    (slow,) = [line for line in groups if line.startswith("group of 99 steps (34%)")]
    assert "time x 3.0" in slow or "time x 2.9" in slow


def test_a_machine_that_is_slow_for_a_while_says_nothing_about_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds that wander, as on a machine with other work, whatever the documents are."""
    rng = np.random.default_rng(1)
    wander = np.exp(np.cumsum(rng.normal(0, 0.05, 301)) + rng.normal(0, 0.3, 301))
    lengths = rng.integers(100, 20000, 300).astype(float)
    monkeypatch.setattr(analyze, "document_lengths", lambda run: lengths)
    folder = write_run(tmp_path / "run", lambda s: 0.1 * float(wander[s]))
    assert not any("times slower" in line for line in findings(read_run(folder)))


def test_steps_that_are_alike_are_one_group(tmp_path: Path) -> None:
    lines = findings(read_run(write_run(tmp_path / "run", lambda s: 0.1)))
    assert any("form one group" in line for line in lines)
    assert not any("times slower" in line for line in lines)


def test_long_documents_that_make_steps_slow_are_named_with_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.array([1000.0 if step % 7 == 0 else 300.0 for step in range(1, 301)])
    monkeypatch.setattr(analyze, "document_lengths", lambda run: lengths)
    folder = write_run(tmp_path / "run", lambda s: 0.16 if s % 7 == 0 else 0.1)
    lines = findings(read_run(folder))
    assert "steps with documents over 650 tokens are 1.6 times slower (42 steps)" in lines


def test_the_lengths_of_a_real_runs_documents_come_from_its_text() -> None:
    run = read_run(finished_run())
    lengths = document_lengths(run)
    assert lengths is not None and len(lengths) == len(run.steps)
    assert (lengths > 0).all() and len(np.unique(lengths)) <= 3  # the text has three files


def test_kernels_are_grouped_by_time_and_intensity(tmp_path: Path) -> None:
    operations = [
        {"name": f"gemm_{i}", "calls": 10, "seconds": 0.5, "share": 0.2, "gflops": 100.0 + i,
         "gb_per_second": 2.0, "source": ["llama.py:1"]}
        for i in range(4)
    ] + [
        {"name": f"norm_{i}", "calls": 10, "seconds": 0.01, "share": 0.02, "gflops": 1.0 + i / 9,
         "gb_per_second": 10.0, "source": ["layers.py:2"]}
        for i in range(4)
    ]  # fmt: skip
    profile = {"step_seconds": 1.0, "operations": operations}
    folder = write_run(tmp_path / "run", lambda s: 0.1, profile=profile)
    kernels = [line for line in findings(read_run(folder)) if "kernels" in line]
    assert len(kernels) == 2
    assert any("group of 4 kernels, 80% of a step: 50.8 FLOP per byte" in k for k in kernels)


def test_a_short_run_says_that_it_is_short(tmp_path: Path) -> None:
    assert findings(read_run(write_run(tmp_path / "run", lambda s: 0.1, 20))) == [
        "20 steps: too few to group, 50 are needed"
    ]


def test_the_command_prints_the_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", lambda s: 0.1)
    assert cli("analyze", folder) == 0
    assert "form one group" in capsys.readouterr().out
    monkeypatch.setattr(analyze, "available", lambda: False)
    assert cli("analyze", folder) == 2
    assert "pip install 'tinyllama-trainer[observe]'" in capsys.readouterr().err
