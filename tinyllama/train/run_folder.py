"""What a run keeps on disk: its folder, its resolved configuration, its checkpoints."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tinyllama.config import Config
from tinyllama.errors import CheckpointError, TrainingError, reason
from tinyllama.system import device, processor
from tinyllama.system.files import InUseError, atomic_write, free_name, held, is_regular
from tinyllama.train.best import Best
from tinyllama.train.checkpoint import (
    later_than,
    list_checkpoints,
    looks_whole,
    read_state,
    recover,
    set_aside,
    step_name,
)
from tinyllama.train.schedule import Anchor
from tinyllama.version import __version__

__all__ = ["looks_whole", "read_state", "step_name"]

METRICS = "metrics.jsonl"
MACHINE = "machine.json"


def micro_batch_size(folder: Path) -> int | None:
    """The micro_batch_size that a checkpoint was trained with, if it says so."""
    size = read_state(folder).get("micro_batch_size")
    return size if isinstance(size, int) and size > 0 else None


def batch_size(state: Mapping[str, Any]) -> int | None:
    """The batch_size that a checkpoint was trained with, if its state says so."""
    size = state.get("made_with", {}).get("training.batch_size")
    return size if isinstance(size, int) and size > 0 else None


def schedule_anchor(state: Mapping[str, Any]) -> Anchor | None:
    """Where the learning rate of a checkpoint began to fall, if not at the end of its warm-up."""
    anchor = state.get("schedule_anchor")
    return None if anchor is None else Anchor(int(anchor["step"]), float(anchor["share"]))


def best(state: Mapping[str, Any]) -> Best | None:
    """The lowest validation loss of a checkpoint's run, if it looks for that."""
    found = state.get("best")
    if found is None:
        return None
    return Best(int(found["step"]), float(found["val_loss"]), int(found["since"]))


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which must exist. Raises CheckpointError if another process does."""
    try:
        with held(folder):
            yield
    except InUseError:
        raise CheckpointError(
            f"{folder}: another process trains there: wait for it, or choose another "
            "folder with --set checkpointing.checkpoint_dir=..."
        ) from None


def clean_up(folder: Path) -> None:
    """Complete or remove what a killed run left in its folder. Raises CheckpointError while
    another process trains there."""
    if folder.is_dir():
        with held_alone(folder):
            recover(folder)


def go_back(folder: Path, resumed: Path, step: int) -> list[tuple[Path, Path]]:
    """Prepare a run's folder for continuing from the checkpoint `resumed`.

    Checkpoints of later steps are renamed; the old and new paths are returned. Their metrics are
    copied first, since the run overwrites them. If `resumed` lies in another folder, metrics found
    here belong to another run and are renamed.
    """
    metrics, is_ours = folder / METRICS, resumed.resolve().parent == folder.resolve()
    if os.path.lexists(metrics) and not is_ours:
        metrics.rename(free_name(metrics))
    elif is_regular(metrics) and later_than(folder, step):
        atomic_write(free_name(metrics), metrics.read_bytes())
    return set_aside(folder, step)


def older_than(checkpoint: Path, step: int) -> Path | None:
    """The newest whole checkpoint beside this one with fewer steps than `step`."""
    others = [p for p in list_checkpoints(checkpoint.parent) if p != checkpoint and looks_whole(p)]
    return next((p for p in reversed(others) if read_state(p)["step"] < step), None)


def check_holds_none(folder: Path) -> None:
    """Raise CheckpointError if the folder of a new run already holds checkpoints."""
    if checkpoints := list_checkpoints(folder):
        raise CheckpointError(
            f"{folder} already holds {checkpoints[-1].name}: continue it with --resume, or choose "
            "another folder with --set checkpointing.checkpoint_dir=..."
        )


def write_config(folder: Path, config: Config) -> None:
    """Write config.toml: every option with the value that the run uses."""
    atomic_write(folder / "config.toml", config.to_toml().encode(), links=False)


def write_machine(folder: Path) -> None:
    """Write machine.json: the device and processor that the run uses, and the libraries."""
    from tinygrad import Device  # takes a while: what is wrong with a folder is said before

    machine = {
        "device": Device.DEFAULT,
        "processor": processor.processor_name(),
        "threads": device.threads(),
        "instruction_set": device.instruction_set() if Device.DEFAULT == "CPU" else "",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "tinygrad": metadata.version("tinygrad"),
        "tinyllama": __version__,
    }
    atomic_write(folder / MACHINE, f"{json.dumps(machine, indent=2)}\n".encode(), links=False)


def so_far(step: int, saved: Path | None) -> str:
    """At which step a run ended and which checkpoint is the last, for messages."""
    there = f"the last checkpoint is {saved}" if saved else "nothing was saved"
    return f"after step {step}, and {there}"


def out_of_memory(error: MemoryError, step: int, saved: Path | None) -> TrainingError:
    """The error of a run whose device has no memory left."""
    return TrainingError(
        f"out of memory {so_far(step, saved)}: {reason(error)}; lower training.micro_batch_size or "
        "data.context_length, or set training.checkpoint_activations = true"
    )
