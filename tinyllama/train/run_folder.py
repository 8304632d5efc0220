"""What a run keeps on disk: its folder, its resolved configuration, its checkpoints."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes

from tinyllama.config import Config
from tinyllama.data.batches import Batches
from tinyllama.errors import (
    CheckpointError,
    TrainingError,
    WeightsError,
    reason,
)
from tinyllama.formats.dtypes import RawArray, to_bfloat16
from tinyllama.formats.peft import AdapterConfig
from tinyllama.formats.safetensors import LazyArray, SafetensorsFile, write_safetensors
from tinyllama.model.llama import Llama
from tinyllama.model.lora import adapter_tensors, write_adapter
from tinyllama.runtime.storage import read, write
from tinyllama.system import device, processor
from tinyllama.system.files import InUseError, atomic_write, free_name, held, is_regular
from tinyllama.tokenizers.tokenizer import Tokenizer, write_files
from tinyllama.train.best import Best
from tinyllama.train.checkpoint import (
    later_than,
    list_checkpoints,
    looks_whole,
    read_state,
    recover,
    save_checkpoint,
    set_aside,
    step_name,
    write_state,
)
from tinyllama.train.manifest import Digests
from tinyllama.train.optimizer import AdamW
from tinyllama.train.schedule import Anchor
from tinyllama.version import __version__

__all__ = ["looks_whole", "read_state", "restore", "save", "step_name"]

METRICS = "metrics.jsonl"
MACHINE = "machine.json"
OPTIMIZER = "optimizer.safetensors"


def save(
    folder: Path,
    model: Llama,
    optimizer: AdamW,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep_last_n: int,
    adapter: AdapterConfig | None = None,
) -> Path:
    """Save a checkpoint folder: weights, the optimizer, the position in the data.

    The weights are a Hugging Face model, or PEFT's two files where there is an `adapter`.
    """
    moments = optimizer.state_dict()

    def fill(partial: Path) -> Digests:
        if adapter is None:
            digests = model.write_folder(partial, tokenizer)
        else:
            digests = write_adapter(partial, model, adapter)
            write_files(tokenizer, partial)
        sources = {name: _stored(t) for name, t in moments.items()}
        digests[OPTIMIZER] = write_safetensors(partial / OPTIMIZER, sources)
        write_state(partial, state)
        return digests

    weights = model.state_dict() if adapter is None else adapter_tensors(model)
    needed = sum(t.nbytes() for t in (*weights.values(), *moments.values()))
    return save_checkpoint(folder.parent, folder.name, fill, keep_last_n, needed_bytes=needed)


def _stored(moment: Tensor) -> LazyArray:
    """A moment of the optimizer as a file holds it: in its own type."""
    name, shape = ("F32" if moment.dtype == dtypes.float32 else "BF16"), tuple(moment.shape)
    return LazyArray(name, shape, lambda: RawArray(name, shape, read(moment)))


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in weights.items():
        values = read(tensor)
        if not np.isfinite((values.min(), values.max())).all():  # a NaN is the least and greatest
            return name
    return None


def restore(folder: Path, optimizer: AdamW, batches: Batches) -> int:
    """Load what `save` kept besides the weights; returns the step. Raises CheckpointError."""
    state = read_state(folder)
    file = SafetensorsFile(folder / OPTIMIZER)
    moments = optimizer.state_dict()
    if set(file.names) != set(moments):
        odd = sorted(set(file.names) ^ set(moments))
        raise CheckpointError(f"{folder / OPTIMIZER}: does not fit the model: {', '.join(odd[:5])}")
    for name, tensor in moments.items():
        if file.shape(name) != tensor.shape:
            shape = file.shape(name)
            raise WeightsError(f"{folder / OPTIMIZER}: {name}: {shape}, not {tensor.shape}")
        if tensor.dtype != dtypes.bfloat16:
            write(tensor, file.float32(name))
        elif file.dtype(name) == "BF16":
            write(tensor, file.array(name))
        else:  # optimizer_state has changed; nearest, since this happens once
            write(tensor, to_bfloat16(file.float32(name)))
        file.forget(name)
    if state.get("data") is None:
        raise CheckpointError(f"{folder}: its state holds no position in the data")
    batches.restore(state["data"])
    step = state["step"]
    assert isinstance(step, int)
    return step


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
