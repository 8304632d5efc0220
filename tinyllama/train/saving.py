"""Tensors of a run in its checkpoints: weights and the moments of AdamW, written and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from tinyllama.data.batches import Batches
from tinyllama.errors import CheckpointError, WeightsError
from tinyllama.formats.dtypes import RawArray, to_bfloat16
from tinyllama.formats.peft import AdapterConfig
from tinyllama.formats.safetensors import LazyArray, SafetensorsFile, write_safetensors
from tinyllama.model.llama import Llama
from tinyllama.model.lora import adapter_tensors, write_adapter
from tinyllama.runtime.storage import read, write
from tinyllama.tokenizers.tokenizer import Tokenizer, write_files
from tinyllama.train.checkpoint import read_state, save_checkpoint, write_state
from tinyllama.train.manifest import Digests
from tinyllama.train.optimizer import AdamW

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
