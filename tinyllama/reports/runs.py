"""A run's folder, read for people: columns of numbers, anomalies, checkpoints, samples.

    metrics.jsonl    one line per step              config.toml     what the run was made with
    machine.json     where it ran                   samples.jsonl   what it wrote on the way
    profile.json     where a step's time goes       step-*, final   its checkpoints
    roofline.json    the machine's ceilings

Everything but metrics.jsonl may be missing. What comes from a file is checked before it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.config.loader import parse_toml
from tinyllama.errors import CheckpointError, reason
from tinyllama.observe.metrics import read_metrics
from tinyllama.observe.samples import Sample, read_samples
from tinyllama.system.files import read_file
from tinyllama.system.untrusted import MAX_JSON_BYTES, parse_json, place_first, printable
from tinyllama.train.checkpoint import list_checkpoints, read_state
from tinyllama.train.run_folder import MACHINE, METRICS

CONFIG, PROFILE, CEILINGS = "config.toml", "profile.json", "roofline.json"
_MOST_CONFIG_BYTES = 1 << 20
_COLUMNS = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes")
_MOST_LAYERS = 512
_MOST_OPERATIONS = 5000
_MOST_NUMBER = 1e30
Column = npt.NDArray[np.float64]
T = TypeVar("T")


_Step = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Word = Annotated[str, msgspec.Meta(max_length=200)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=_MOST_NUMBER)]
_Above = Annotated[float, msgspec.Meta(gt=0, le=_MOST_NUMBER)]
_Place = Annotated[str, msgspec.Meta(max_length=5000)]  # a path, or why there is none


class Note(msgspec.Struct):
    """An anomaly as metrics.jsonl holds it, with its step."""

    kind: _Word
    series: _Word
    action: _Word
    value: float | None = None
    usual: float | None = None
    documents: Annotated[list[_Place], msgspec.Meta(max_length=100)] = []
    layer: _Word | None = None
    step: int = 0


class RolledBack(msgspec.Struct, rename={"origin": "from", "target": "to"}):
    """That the run went back, and why."""

    origin: _Step
    target: _Step
    anomalies: Annotated[list[Note], msgspec.Meta(max_length=100)] = []


class _Watched(msgspec.Struct):
    """What a line of metrics.jsonl says besides numbers."""

    anomalies: list[Note] = []
    update_ratios: dict[_Word, float] = {}
    rolled_back: RolledBack | None = None


class KeptOperation(msgspec.Struct):
    """An operation of profile.json; calls and seconds are per step."""

    name: str
    source: list[str] = []
    calls: _Amount = 0.0
    seconds: _Amount = 0.0
    share: _Amount = 0.0
    gflops: _Amount = 0.0
    gb_per_second: _Amount = 0.0

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte; 0 where it is not known."""
        return self.gflops / self.gb_per_second if self.gb_per_second > 0 else 0.0


class KeptProfile(msgspec.Struct):
    """What `tinyllama profile` keeps beside a run."""

    step_seconds: _Amount
    operations: Annotated[list[KeptOperation], msgspec.Meta(max_length=_MOST_OPERATIONS)]


class KeptCeilings(msgspec.Struct):
    """What the machine of a profile can do."""

    float32_gflops: _Above
    bfloat16_gflops: _Above
    gb_per_second: _Above


@dataclass
class Run:
    """What a run's folder says; `columns` hold NaN where a step has no value."""

    path: Path
    name: str
    columns: dict[str, Column]
    anomalies: list[Note] = field(default_factory=list)
    rollbacks: list[RolledBack] = field(default_factory=list)
    checkpoints: list[tuple[int, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    profile: KeptProfile | None = None
    ceilings: KeptCeilings | None = None

    @property
    def steps(self) -> Column:
        """The step of each line."""
        return self.columns["step"]

    @property
    def layers(self) -> list[str]:
        """The layers whose update-to-weight ratio was measured."""
        return [name.removeprefix("ratio ") for name in self.columns if name.startswith("ratio ")]

    @property
    def roofline_points(self) -> list[KeptOperation]:
        """The operations of its profile that compute."""
        operations = self.profile.operations if self.profile else []
        return [o for o in operations if 0 < o.intensity <= _MOST_NUMBER]


def read_run(path: Path, *, begun: bool = False) -> Run:
    """Read the folder of a run. Raises CheckpointError where it is none, or holds no step; with
    `begun`, a run that has not made its first step is one."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    has_begun = begun and (path / CONFIG).is_file()
    try:
        rows = read_metrics(path / METRICS)
    except FileNotFoundError:
        if not has_begun:
            raise CheckpointError(f"{path / METRICS}: no such file: name a run's folder") from None
        rows = []
    if not rows and not has_begun:
        raise CheckpointError(f"{path / METRICS}: holds no step")
    config = _config(path / CONFIG)
    columns = _columns(rows, config)
    anomalies, rollbacks = _watched(rows, columns, path / METRICS)
    return Run(
        path,
        path.name or str(path),
        columns,
        anomalies,
        rollbacks,
        _checkpoints(path),
        read_samples(path),
        config,
        _if_there(path / MACHINE, dict[str, Any]) or {},
        _if_there(path / PROFILE, KeptProfile),
        _if_there(path / CEILINGS, KeptCeilings),
    )


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with as much of their paths in their names as tells them apart."""
    for length in range(1, 1 + max(len(run.path.absolute().parts) for run in runs)):
        names = [str(Path(*run.path.absolute().parts[-length:])) for run in runs]
        if len(set(names)) == len(names):
            break
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        run.name = name if names.count(name) == 1 else f"{name} ({number + 1})"
    return list(runs)


def _columns(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Column]:
    columns = {"step": np.array([row["step"] for row in rows], np.float64)}
    for name in _COLUMNS:
        columns[name] = np.array([_number(row.get(name)) for row in rows], np.float64)
    batch, context = (_size(config.get(key)) for key in ("training.batch_size", "context"))
    full = float(batch * context)
    known = np.array([_number(row.get("trained_tokens")) for row in rows], np.float64)
    per_step = np.where(np.isnan(known), full, known)
    columns["tokens"] = columns["step"] * full
    if np.isfinite(known).any():  # rows that are not full, or not trained as a whole
        columns["tokens"] = np.cumsum(per_step * (columns["step"] > 0))
    speed = columns["tokens_per_second"]
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(speed > 0, per_step / speed, 0.0)
    columns["step_seconds"] = seconds
    columns["seconds"] = np.cumsum(np.nan_to_num(seconds))
    return columns


def _number(value: object) -> float:
    """The value as a column holds it: NaN where it is no number, or none that a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return np.nan
    return float(value) if abs(value) < _MOST_NUMBER else np.nan


def _size(value: object) -> int:
    """A batch or context size; 1 where there is none that makes sense."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return value if is_size else 1  # type: ignore[return-value]


def _watched(
    rows: Sequence[dict[str, Any]], columns: dict[str, Column], path: Path
) -> tuple[list[Note], list[RolledBack]]:
    """Anomalies and rollbacks of the lines; the layers' ratios become columns."""
    anomalies: list[Note] = []
    rollbacks: list[RolledBack] = []
    for index, row in enumerate(rows):
        if not {"anomalies", "update_ratios", "rolled_back"} & row.keys():
            continue
        try:
            line = msgspec.convert(row, _Watched)
        except msgspec.ValidationError as error:
            raise CheckpointError(
                f"{path}: not a metrics file: step {row['step']}: {place_first(error)}"
            ) from None
        for note in line.anomalies:
            note.step = row["step"]
            anomalies.append(note)
        if len(line.update_ratios) > _MOST_LAYERS:
            raise CheckpointError(f"{path}: step {row['step']}: more than {_MOST_LAYERS} layers")
        for layer, ratio in line.update_ratios.items():
            if f"ratio {layer}" not in columns and len(columns) > _MOST_LAYERS:
                continue
            empty = np.full(len(rows), np.nan)
            columns.setdefault(f"ratio {layer}", empty)[index] = ratio
        if line.rolled_back is not None:
            rollbacks.append(line.rolled_back)
    return anomalies, rollbacks


def _checkpoints(folder: Path) -> list[tuple[int, str]]:
    """Step and name of the checkpoints that are there."""
    found = []
    for path in list_checkpoints(folder):
        try:
            found.append((int(read_state(path)["step"]), path.name))
        except (CheckpointError, OSError):  # damaged: other commands say so
            continue
    return found


def _config(path: Path) -> dict[str, Any]:
    """The options of config.toml by their dotted keys, and `context`, the tokens of a row."""
    if not path.is_file():
        return {}
    try:
        sections = parse_toml(read_file(path, _MOST_CONFIG_BYTES, links=False).decode())
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else printable(error)
        raise CheckpointError(f"{path}: cannot be read: {why}") from None
    flat = {
        f"{section}.{key}": value
        for section, options in sections.items()
        if isinstance(options, dict)
        for key, value in options.items()
    }
    return flat | {"context": flat.get("data.context_length", flat.get("model.max_seq_len", 0))}


def _if_there(path: Path, kind: type[T]) -> T | None:
    """The object in a JSON file that is no link; None without a file."""
    if not path.is_file():
        return None
    try:
        data = read_file(path, MAX_JSON_BYTES, links=False)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from None
    return parse_json(data, kind, CheckpointError, str(path))
