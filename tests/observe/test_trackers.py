"""Each tracker gets a run's numbers, read back by its own library; none can stop a run."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

from tinyllama.observe import trackers
from tinyllama.observe.trackers import Trackers, numbers

LINES = [
    {"step": 1, "loss": 6.5, "lr": 1e-3, "epoch": 1},
    {"step": 2, "loss": 6.25, "lr": 2e-3, "epoch": 1, "val_loss": 6.375},
]


def tracked(folder: Path, *names: str) -> list[str]:
    """The notices of a run of two steps that these trackers follow."""
    notices: list[str] = []
    run = Trackers(names, folder, {"model.num_layers": 2}, notices.append)
    for line in LINES:
        run.log(line)
    run.close()
    return notices


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    needs("tensorboard")
    assert tracked(tmp_path, "tensorboard") == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 6.5), (2, 6.25)]
    assert [(e.step, e.value) for e in read.Scalars("val_loss")] == [(2, 6.375)]


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_back_what_was_logged(tmp_path: Path) -> None:
    needs("mlflow")
    needs("sqlalchemy")
    assert tracked(tmp_path, "mlflow") == []
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tinyllama")
    (run,) = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(1, 6.5), (2, 6.25)]
    assert run.data.params == {"model.num_layers": "2"}
    assert run.info.status == "FINISHED"


def records(content: bytes) -> list[bytes]:
    """The records of a .wandb file of one block: LevelDB's log format behind a header of 7 bytes;
    a record is a checksum of 4 bytes, 2 of its length, 1 of its kind, and its content."""
    assert content[:4] == b":W&B" and len(content) <= 32768
    found, at = [], 7
    while at + 7 <= len(content):
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        assert kind == 1, "a whole record"
        found.append(content[at + 7 : at + 7 + length])
        at += 7 + length
    return found


@pytest.mark.filterwarnings("default")
def test_wandb_reads_back_what_was_logged(tmp_path: Path) -> None:
    needs("wandb")
    assert tracked(tmp_path, "wandb") == []
    from wandb.proto import wandb_internal_pb2

    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
        if "loss" in items:
            found.append(float(items["loss"]))
    assert found == [6.5, 6.25]


@pytest.mark.filterwarnings("default")
def test_trackio_reads_back_what_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert tracked(tmp_path / "run", "trackio") == []
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("tinyllama", "run")
    assert [(log["step"], log["loss"]) for log in logs] == [(1, 6.5), (2, 6.25)]


class Failing:
    """A tracker that takes one step and no more."""

    def __init__(self, *_: Any) -> None:
        self.taken = 0

    def log(self, *_: Any) -> None:
        self.taken += 1
        if self.taken > 1:
            raise ConnectionError("no route to host\nand more")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is not used any more")


def test_a_tracker_that_fails_costs_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    assert tracked(tmp_path, "wandb") == [
        "observe.trackers: wandb: no route to host; the run goes on without it"
    ]


def test_a_tracker_that_is_not_installed_costs_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> trackers.Tracker:
        raise ImportError("No module named 'mlflow'")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", missing)
    (notice,) = tracked(tmp_path, "mlflow")
    assert "mlflow is not installed (pip install 'tinyllama-trainer[mlflow]')" in notice


def test_a_slow_tracker_does_not_hold_up_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Failing):
        def log(self, *_: Any) -> None:
            time.sleep(10)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Slow)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.05)
    notices: list[str] = []
    begin = time.monotonic()
    run = Trackers(["wandb"], tmp_path, {}, notices.append)
    for step in range(100):
        run.log({"step": step, "loss": 1.0})
    run.close()
    assert time.monotonic() - begin < 2
    assert any("too slow, so 9" in notice for notice in notices)  # 96 or 97 of them


def test_the_numbers_of_a_line_are_flat() -> None:
    line = {"step": 3, "loss": 1.5, "update_ratios": {"layer 0": 0.01}, "anomalies": [{}, {}]}
    assert numbers(line) == {"loss": 1.5, "update_ratios/layer 0": 0.01, "anomalies": 2.0}
