"""A run's folder from somebody else: no name in it leads to another file, none is waited for."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs_helpers import cli, config_file, finished_run, metrics, names

from tinyllama.observe.metrics import MetricsLog, read_metrics
from tinyllama.observe.samples import SAMPLES, Sample, forget_after, read_samples
from tinyllama.train.checkpoint import STATE, read_state, step_name
from tinyllama.train.manifest import MANIFEST, write_manifest

WRITTEN = ("metrics.jsonl", "config.toml", "machine.json", SAMPLES)


def part_of_a_run(run: Path, *steps: int) -> Path:
    """A copy of a run that was killed after these checkpoints."""
    run.mkdir(parents=True)
    for step in steps:
        shutil.copytree(finished_run() / step_name(step), run / step_name(step))
    shutil.copy(finished_run() / "metrics.jsonl", run)
    return run


def plant(path: Path, kind: str, victim: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to(victim if kind == "link" else victim.with_name("made"))


@pytest.mark.parametrize("kind", ["link", "pipe", "zeros", "loop", "link to nothing"])
def test_what_a_run_writes_goes_through_no_name_that_was_planted(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of_a_run(tmp_path / "run", 4)
    victim = tmp_path / "elsewhere" / "precious"
    victim.parent.mkdir()
    victim.write_text("precious\n")
    for name in WRITTEN:
        plant(run / name, kind, victim)
    assert cli("train", config_file(run), "--resume", "--set", "training.max_steps=5") == 0
    assert victim.read_text() == "precious\n" and os.listdir(victim.parent) == ["precious"]
    assert all((run / name).is_file() and not (run / name).is_symlink() for name in WRITTEN)
    assert list(metrics(run)) == [5]
    said = capsys.readouterr().err
    assert f"{run}/metrics.jsonl: is a link, a folder or a pipe, so a new file is begun" in said


@pytest.mark.parametrize("kind", ["link", "pipe", "zeros"])
def test_no_log_is_opened_through_what_was_planted(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "precious"
    victim.write_text("precious\n")
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    plant(tmp_path / "metrics.jsonl", kind, victim)
    assert log.is_gone()
    with pytest.raises(OSError):
        log.reopen()
    with pytest.raises(Exception, match=r"metrics\.jsonl: cannot be read: "):
        read_metrics(tmp_path / "metrics.jsonl")
    assert victim.read_text() == "precious\n"


def sample(step: int) -> str:
    return json.dumps({"step": step, "prompt": "def ", "text": f"def {step}"}) + "\n"


@pytest.mark.parametrize(
    "damage", ["torn\n", '{"step": -1}\n', "[" * 10**5 + "\n", "\0" * 99 + "\n", "\udcff\n"]
)
def test_damaged_samples_do_not_keep_a_run_from_going_on(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    was = (sample(2) + damage + sample(4) + sample(6) + '{"step": 8, "pro').encode(
        errors="surrogateescape"
    )
    (tmp_path / SAMPLES).write_bytes(was)
    forget_after(tmp_path, 4)
    assert read_samples(tmp_path) == [Sample(2, "def ", "def 2"), Sample(4, "def ", "def 4")]
    assert (tmp_path / f"{SAMPLES}.aside-1").read_bytes() == was
    assert capsys.readouterr().err == (
        f"{tmp_path}/{SAMPLES}: damaged lines are left out; the file as it was is now "
        f"{SAMPLES}.aside-1\n"
    )


def test_whole_samples_are_cut_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SAMPLES).write_text(sample(2) + sample(4))
    forget_after(tmp_path, 3)
    assert (tmp_path / SAMPLES).read_text() == sample(2)
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLES]


def test_metrics_have_each_step_once_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 3, "loss": 3.0}, {"step": 1, "loss": 1.0}, {"step": 2}, {"step": 3, "lr": 1}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLog(file, 4).close()
    assert read_metrics(file) == [lines[1], lines[2], lines[3]]


def changed_state(folder: Path, **changes: object) -> None:
    """A checkpoint with another state, whose sums hold: a stranger can write them."""
    (folder / STATE).write_text(json.dumps(read_state(folder) | changes))
    (folder / MANIFEST).unlink()
    write_manifest(folder, {})


def test_a_state_with_more_about_the_best_step_or_nothing_is_read(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", 4)
    for best in (None, {"step": 2, "val_loss": 1.5, "since": 0, "more": [1]}):
        changed_state(run / step_name(4), best=best)
        more = ("--set", "training.max_steps=5")
        assert cli("train", config_file(run), "--resume", run / step_name(4), *more) == 0
        shutil.rmtree(run / "final")


def test_a_state_without_a_position_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of_a_run(tmp_path / "run", 4)
    changed_state(run / step_name(4), data=None)
    assert cli("train", config_file(run), "--resume") == 2
    assert "its state holds no position in the data" in capsys.readouterr().err


def test_what_a_state_says_of_its_options_is_said_in_a_short_printable_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = part_of_a_run(tmp_path / "run", 4)
    made_with = read_state(run / step_name(4))["made_with"]
    hostile = {f"\x1b[2J{n}": "\x1b[31m" + "x" * 999 for n in range(500)}
    changed_state(run / step_name(4), made_with=made_with | hostile)
    assert cli("train", config_file(run), "--resume", "--set", "training.max_steps=5") == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "trained with other options" in line)
    assert line.isprintable() and len(line) < 20_000
    assert r"\x1b[2J0 is nothing, was" in line


def test_a_state_and_a_manifest_are_of_bounded_size(tmp_path: Path) -> None:
    run = part_of_a_run(tmp_path / "run", 2, 4)
    for name in (STATE, MANIFEST):
        shutil.copytree(run / step_name(4), run / "kept")
        (run / step_name(4) / name).write_bytes(b'{"step": 4, "x": [' + b"[]," * 10**6 + b"[]]}")
        assert cli("train", config_file(run), "--resume", "--set", "training.max_steps=3") == 0
        assert names(run)[0] == step_name(2)
        shutil.rmtree(run)
        part_of_a_run(run, 2, 4)


@pytest.mark.parametrize("how", ["every byte", "other files", "pipes", "links"])
def test_a_damaged_cache_heals_and_the_losses_are_those_of_a_whole_one(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = ["train", config_file(run), "--quiet", "--set", "training.max_steps=2"]
    words += ["--set", f"data.cache_dir={cache}", "--set", "data.tokenizer=train"]
    words += ["--set", "data.tokenizer_vocab_size=350"]
    assert cli(*words) == 0
    whole = {step: line["loss"] for step, line in metrics(run).items()}
    shutil.rmtree(run)
    victim = tmp_path / "precious"
    victim.write_text("precious")
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert {"tokens.bin", "documents.bin", "meta.json", "tokenizer.model"} <= {p.name for p in kept}
    contents = [path.read_bytes() for path in kept]
    for path, data, other in zip(kept, contents, contents[1:] + contents[:1], strict=True):
        if how == "every byte":
            path.write_bytes(bytes(byte ^ 255 for byte in data))
        elif how == "other files":
            path.write_bytes(other)
        else:
            path.unlink()
            os.mkfifo(path) if how == "pipes" else path.symlink_to(victim)
    capsys.readouterr()
    assert cli(*words) == 0
    assert {step: line["loss"] for step, line in metrics(run).items()} == whole
    said = capsys.readouterr().err.splitlines()
    assert any(line.endswith("; the tokenizer is trained again") for line in said)
    assert any(line.endswith("; the text is tokenized again") for line in said)
    assert [path.read_bytes() for path in kept if path.name != "digests.json"] == [
        data for path, data in zip(kept, contents, strict=True) if path.name != "digests.json"
    ]
    assert victim.read_text() == "precious"
