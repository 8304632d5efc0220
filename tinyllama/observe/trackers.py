"""Programs that people follow runs with: TensorBoard, Weights & Biases, trackio, MLflow.

Each is an extra of its own; all of them are `trackers`. A thread gives them the numbers, so that
one that is slow never holds up a step; one that fails, or is not installed, costs one notice, and
the run goes on without it. They keep what they keep below the run's folder, on this machine, unless
their own settings say something else (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...).
"""

import importlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tinyllama.system import device

_MOST_WAITING = 10_000  # lines; more are left out, and counted
_CLOSE_SECONDS = 30.0

Values = Mapping[str, float]


class Tracker(Protocol):
    """One program: gets the numbers of each step, and the end of the run."""

    def log(self, step: int, values: Values) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files, which `tensorboard --logdir RUN` shows."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        protos = importlib.import_module("tensorboard.compat.proto")
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module(f"{protos.__name__}.event_pb2").Event
        self._summary = importlib.import_module(f"{protos.__name__}.summary_pb2").Summary
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"))
        self._clock = importlib.import_module("time").time

    def log(self, step: int, values: Values) -> None:
        value = self._summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in values.items()]
        summary = self._summary(value=scalars)
        self._writer.add_event(self._event(wall_time=self._clock(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; without a login its files stay here, and `wandb sync` sends them."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        mode = device.variable("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=device.variable("WANDB_PROJECT") or "tinyllama",
            name=folder.name, dir=str(folder), config=dict(config), mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its own database on this machine."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        project = device.variable("TRACKIO_PROJECT") or "tinyllama"
        self._run = trackio.init(project=project, name=folder.name, config=dict(config))
        self._trackio = trackio

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; without MLFLOW_TRACKING_URI in a database beside the run's files."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        tracking = importlib.import_module("mlflow.tracking")
        place = folder.absolute() / "mlflow.db"
        uri = device.variable("MLFLOW_TRACKING_URI") or f"sqlite:///{place}"
        self._client = tracking.MlflowClient(uri)
        name = device.variable("MLFLOW_EXPERIMENT_NAME") or "tinyllama"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """Gives the lines of a run to the trackers that are named; `close` at its end."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        notice: Callable[[str], None],
    ) -> None:
        """`config` is noted with the run; `notice` is called with a line per tracker that fails."""
        self._names, self._folder, self._config = list(dict.fromkeys(names)), folder, config
        self._notice, self._left_out = notice, 0
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        if self._names:
            self._thread = threading.Thread(target=self._give, name="trackers", daemon=True)
            self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Give a line of metrics to each tracker, without waiting for it."""
        if self._thread is None:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Wait until everything is given, half a minute at most."""
        if self._thread is None:
            return
        with suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._notice("observe.trackers: too slow, so the last steps are missing there")
        if self._left_out:
            self._notice(f"observe.trackers: too slow, so {self._left_out} steps are missing there")
        self._thread = None

    def _give(self) -> None:
        """What the thread does: open, give every line, close."""
        open_ = {name: self._opened(name) for name in self._names}
        trackers = {name: tracker for name, tracker in open_.items() if tracker is not None}
        while (line := self._lines.get()) is not None:
            values = numbers(line)
            for name in list(trackers):
                if not self._works(name, trackers[name].log, line["step"], values):
                    del trackers[name]
        for name, tracker in trackers.items():
            self._works(name, tracker.close)

    def _opened(self, name: str) -> Tracker | None:
        try:
            return TRACKERS[name](self._folder, self._config)
        except ImportError:
            self._notice(
                f"observe.trackers: {name} is not installed (pip install "
                f"'tinyllama-trainer[{name}]'); the run goes on without it"
            )
        except Exception as error:  # of a program that is not ours
            self._failed(name, error)
        return None

    def _works(self, name: str, do: Callable[..., None], *arguments: Any) -> bool:
        try:
            do(*arguments)
        except Exception as error:  # of a program that is not ours
            self._failed(name, error)
            return False
        return True

    def _failed(self, name: str, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._notice(f"observe.trackers: {name}: {first[:200]}; the run goes on without it")


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, those of layers by LAYER under update_ratios/."""
    flat = {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step"
    }
    ratios = line.get("update_ratios", {})
    flat |= {f"update_ratios/{layer}": float(ratio) for layer, ratio in ratios.items()}
    return flat | ({"anomalies": float(len(line["anomalies"]))} if "anomalies" in line else {})
