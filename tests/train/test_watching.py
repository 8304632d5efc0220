"""A run that meets an anomaly: it notes it, leaves the update out, goes back or stops; and a run
that is stopped and resumed does the same, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs_helpers import configuration, metrics, numbers, shared_folder, train, trainer

from tinyllama.errors import TrainingError
from tinyllama.formats.safetensors import SafetensorsFile
from tinyllama.observe import anomalies
from tinyllama.observe import text as watched_text
from tinyllama.observe.samples import read_samples
from tinyllama.runtime.storage import read
from tinyllama.train.checkpoint import read_state
from tinyllama.train.trainer import Trainer
from tinyllama.train.watching import layer_of, update_ratios

ROWS, BAD = 60, 41


@pytest.fixture(autouse=True)
def _short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run of seconds knows what is usual."""
    monkeypatch.setattr(anomalies, "WARM", 12)


@pytest.fixture
def loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unusual must show in loss or norm: the text is not looked at."""
    monkeypatch.setattr(watched_text, "SCORE", 100.0)


def text(tmp_path: Path) -> Path:
    """Rows of code that are much alike, and one of noise."""
    file = tmp_path / "text.jsonl"
    rows = [f"def function_{i}(value):\n    return value + {i}\n" * 3 for i in range(ROWS)]
    noise = np.random.default_rng(0).integers(33, 126, 300)
    rows[BAD] = "".join(map(chr, noise))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def options(tmp_path: Path, action: str, *more: str) -> list[str]:
    return [
        f"data.train_path={str(text(tmp_path))!r}", f"observe.on_anomaly={action}",
        "training.batch_size=2", "training.num_epochs=1", "training.learning_rate=3e-3",
        "observe.anomaly_window=32", "checkpointing.save_every=5", *more,
    ]  # fmt: skip


def spikes(run: Path) -> dict[int, list[dict[str, object]]]:
    """The notes of each step about loss and gradient norm."""
    found = {}
    for step, line in metrics(run).items():
        notes = [n for n in line.get("anomalies", ()) if n["series"] in ("loss", "grad_norm")]
        if notes:
            found[step] = notes
    return found


@pytest.mark.usefixtures("loss_alone")
def test_a_note_names_step_document_and_layer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(configuration(run, *options(tmp_path, "note")))
    found = spikes(run)
    assert found
    notes = [note for notes in found.values() for note in notes]
    assert all(note["action"] == "note" and note["kind"] == "spike" for note in notes)
    assert any(f"{tmp_path / 'text.jsonl'} row {BAD + 1}" in n["documents"] for n in notes)
    assert all(n["layer"] in ("embedding", "layer 0", "layer 1", "norm", "head") for n in notes)


@pytest.mark.usefixtures("loss_alone")
def test_a_skipped_update_changes_neither_weights_nor_moments(tmp_path: Path) -> None:
    run = trainer(configuration(tmp_path / "run", *options(tmp_path, "skip")))
    before: dict[str, np.ndarray] = {}
    real, left_out = run.train_step, []

    def step(*arguments):
        tensors = run.optimizer.parameters | run.optimizer.state_dict()
        for name, tensor in tensors.items():
            before[name] = read(tensor).copy()
        result = real(*arguments)
        same = all(np.array_equal(before[n], read(t)) for n, t in tensors.items())
        assert same == (not result.applied)
        left_out.append(not result.applied)
        return result

    run.train_step = step
    run.run()
    assert sum(left_out) == run.watching.left_out > 0
    steps = [number for number, was in enumerate(left_out, 1) if was]
    assert list(spikes(tmp_path / "run")) == steps
    assert read_state(tmp_path / "run" / "final")["watching"]["left_out"] == len(steps)


def same_runs(one: Path, other: Path) -> None:
    """Both runs have the same numbers, anomalies, weights and moments."""
    assert numbers_without_machine(one) == numbers_without_machine(other)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [SafetensorsFile(run / "final" / name) for run in (one, other)]
        for tensor in files[0].names:
            assert np.array_equal(*(file.float32(tensor) for file in files)), tensor
    assert read_state(one / "final") == read_state(other / "final")


def numbers_without_machine(run: Path):
    found = numbers(run)
    for line in found.values():
        line["anomalies"] = [
            n for n in line.get("anomalies", ()) if n["series"] in ("loss", "grad_norm")
        ]
    return found


@pytest.mark.usefixtures("loss_alone")
@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("stop", [7, 20])
def test_a_run_that_is_stopped_and_resumed_does_the_same(
    tmp_path: Path, action: str, stop: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(configuration(whole, *options(tmp_path, action)))
    lines = metrics(whole)
    assert any(line.get("anomalies") or line.get("rolled_back") for line in lines.values())
    first = trainer(configuration(cut, *options(tmp_path, action)))
    real = first.train_step

    def step(*arguments):
        if arguments[1] == stop + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    first.train_step = step
    with pytest.raises(KeyboardInterrupt):
        first.run()
    train(
        configuration(cut, *options(tmp_path, action)),
        resume=cut / f"step-{stop - stop % 5:08d}",
    )
    same_runs(whole, cut)


@pytest.mark.usefixtures("loss_alone")
def test_a_rollback_takes_the_last_checkpoint_and_the_data_that_follows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = train(configuration(run, *options(tmp_path, "rollback")))
    lines = metrics(run)
    back = {step: line["rolled_back"] for step, line in lines.items() if "rolled_back" in line}
    assert back
    for step, event in back.items():
        assert step == event["to"] + 1 and event["from"] > event["to"] == event["to"] // 5 * 5
        assert event["anomalies"][0]["action"] == "rollback"
    assert list(lines) == list(range(1, outcome.step + 1))
    assert list(run.glob("metrics.jsonl.aside-*"))  # what was left behind can be looked at
    assert outcome.finished


@pytest.mark.usefixtures("loss_alone")
def test_a_rollback_does_not_take_a_checkpoint_that_a_disk_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Trainer.save

    def damaging(self: Trainer, name: str) -> Path:
        folder = save(self, name)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-9] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return folder

    monkeypatch.setattr(Trainer, "save", damaging)
    run = tmp_path / "run"
    assert train(configuration(run, *options(tmp_path, "rollback"))).finished
    assert spikes(run) and not any("rolled_back" in line for line in metrics(run).values())
    said = capsys.readouterr().err
    assert "model.safetensors: changed: SHA-256 is " in said
    assert ": the run does not go back to it\n" in said


@pytest.mark.usefixtures("loss_alone")
def test_a_run_that_stops_saves_what_came_before_and_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"so training stops as observe\.on_anomaly says") as e:
        train(configuration(run, *options(tmp_path, "stop")))
    step = int(str(e.value).split(":")[0].removeprefix("step "))
    saved = run / f"step-{step - 1:08d}"
    assert str(saved) in str(e.value) and read_state(saved)["step"] == step - 1
    assert list(spikes(run))[-1] == step
    outcome = train(configuration(run, *options(tmp_path, "skip")), resume=saved)
    assert outcome.finished
    whole = tmp_path / "whole"
    train(configuration(whole, *options(tmp_path, "skip")))
    assert [line["loss"] for line in metrics(run).values()] == [
        line["loss"] for line in metrics(whole).values()
    ]


def test_update_ratios_are_those_of_the_step_that_was_made(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", "training.max_steps=3", "training.weight_decay=0.0")
    run = trainer(config)
    real, seen = run.train_step, []

    def step(batches, number, lr):
        before = {name: read(p).copy() for name, p in run.optimizer.parameters.items()}
        result = real(batches, number, lr)
        changed, size = {}, {}
        for name, p in run.optimizer.parameters.items():
            layer = layer_of(name)
            changed[layer] = changed.get(layer, 0) + ((read(p) - before[name]) ** 2).sum()
            size[layer] = size.get(layer, 0) + (read(p) ** 2).sum()
        seen.append({layer: (changed[layer] / size[layer]) ** 0.5 for layer in changed})
        assert update_ratios(run.optimizer, number, lr) == pytest.approx(seen[-1], rel=1e-2)
        return result

    run.train_step = step
    run.run()
    assert len(seen) == 3 and set(seen[0]) == {"embedding", "layer 0", "layer 1", "norm", "head"}


def test_samples_are_written_where_they_are_due_and_change_no_number(tmp_path: Path) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    wanted = ['observe.sample_prompts=["def "]', "observe.sample_every=4"]
    wanted += ["observe.sample_tokens=8"]
    train(configuration(plain, "training.max_steps=9"))
    train(configuration(run, "training.max_steps=9", *wanted))
    samples = read_samples(run)
    assert [(s.step, s.prompt) for s in samples] == [(4, "def "), (8, "def ")]
    assert all(s.text.startswith("def ") and len(s.text) > 4 for s in samples)
    assert numbers(plain) == numbers(run)
    again = trainer(
        configuration(run, "training.max_steps=9", *wanted, "checkpointing.save_every=1000"),
        resume=run / "final",
    )
    again.run()
    assert read_samples(run) == samples


def test_a_damaged_state_of_anomalies_is_one_message() -> None:
    from tinyllama.errors import CheckpointError
    from tinyllama.train.watching import Watching

    made = trainer(configuration(shared_folder() / "unused"))
    with pytest.raises(CheckpointError, match="state of anomalies is damaged"):
        Watching(made.config, made.batches, (), {"watch": {"loss": 3}})


# ---- unusual text, and an update that moves too much


def notes_of(run: Path, series: str) -> dict[int, list[dict[str, object]]]:
    """The notes of each step about a series."""
    found = {
        step: [note for note in line.get("anomalies", ()) if note["series"] == series]
        for step, line in metrics(run).items()
    }
    return {step: notes for step, notes in found.items() if notes}


@pytest.mark.parametrize("action", ["note", "skip", "rollback"])
def test_a_damaged_document_is_named_alone_and_left_out(tmp_path: Path, action: str) -> None:
    run = tmp_path / "run"
    outcome = train(configuration(run, *options(tmp_path, action)))
    found = notes_of(run, "text")
    assert found
    done = "note" if action == "note" else "skip"  # nothing was changed, so nothing is taken back
    wanted = f"{tmp_path / 'text.jsonl'} row {BAD + 1}"
    for (note,) in found.values():
        assert note["kind"] == "text" and note["action"] == done
        # A row of the batch holds the end of the document before, or the begin of the next one.
        assert wanted in note["documents"] and len(note["documents"]) <= 3
    assert outcome.finished
    left_out = read_state(run / "final")["watching"]["left_out"]
    assert left_out == 0 if action == "note" else left_out >= len(found)


def with_a_wrong_rate(run: Trainer, at: int, bad: list[np.ndarray] | None = None) -> Trainer:
    """The run, which meets the data of step `at` with 30 times its learning rate; `bad` are the
    tokens of that step, or empty until it is met."""
    real, bad = run.train_step, [] if bad is None else bad

    def step(batches, number, lr, *rest):
        if number == at and not bad:
            bad.append(batches[0].tokens)
        is_wrong = bad and np.array_equal(batches[0].tokens, bad[0])
        return real(batches, number, lr * (30 if is_wrong else 1), *rest)

    run.train_step = step
    return run


def usual_text(action: str) -> list[str]:
    return [f"observe.on_anomaly={action}", "training.batch_size=4", "checkpointing.save_every=5"]


def test_an_update_that_moves_too_much_is_found_at_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with_a_wrong_rate(trainer(configuration(run, *usual_text("note"))), 23).run()
    (note,) = notes_of(run, "update").pop(23)
    assert note["kind"] == "spike" and note["value"] > 10 * note["usual"]


def test_a_rollback_takes_an_update_back_that_moved_too_much(tmp_path: Path) -> None:
    whole, cut, bad = tmp_path / "whole", tmp_path / "cut", []
    with_a_wrong_rate(trainer(configuration(whole, *usual_text("rollback"))), 23, bad).run()
    back = [line["rolled_back"] for line in metrics(whole).values() if "rolled_back" in line]
    assert [(event["from"], event["to"]) for event in back] == [(23, 20)]
    first = with_a_wrong_rate(trainer(configuration(cut, *usual_text("rollback"))), 23, bad)
    real = first.train_step

    def step(*arguments):
        if arguments[1] == 22:
            raise KeyboardInterrupt
        return real(*arguments)

    first.train_step = step
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = trainer(configuration(cut, *usual_text("rollback")), resume=cut / "step-00000020")
    with_a_wrong_rate(again, 23, bad).run()
    same_runs(whole, cut)


def test_a_run_that_stops_at_such_an_update_names_the_checkpoint_before_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun = with_a_wrong_rate(trainer(configuration(run, *usual_text("stop"))), 23)
    with pytest.raises(TrainingError, match=r"step 23: update .*step-00000020 holds what came"):
        begun.run()
