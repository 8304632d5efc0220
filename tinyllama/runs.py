"""What a run keeps on disk: its tokenizer, its resolved configuration, its checkpoints."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.checkpoint import (
    latest_valid,
    list_checkpoints,
    read_state,
    recover,
    save_checkpoint,
    step_name,
    verify,
    write_state,
)
from tinyllama.config import Config
from tinyllama.data import Batches
from tinyllama.errors import CheckpointError, ConfigError, TokenizerError, WeightsError, naming
from tinyllama.files import atomic_write
from tinyllama.lora import adapter_tensors, write_adapter
from tinyllama.manifest import Digests
from tinyllama.model import Llama
from tinyllama.ops.storage import read, write
from tinyllama.optim import AdamW
from tinyllama.sources import content_digests, find_sources, read_texts
from tinyllama.tokenizer import MODEL_FILE, TRAINING, Tokenizer, load_tokenizer, train_tokenizer
from tinyllama.weights.peft import AdapterConfig
from tinyllama.weights.safetensors import SafetensorsFile, write_safetensors

__all__ = ["list_checkpoints", "recover", "restore", "resume_folder", "save", "step_name"]

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
            tokenizer.save(partial)
        sources = {name: (lambda t=t: read(t)) for name, t in moments.items()}
        digests[OPTIMIZER] = write_safetensors(partial / OPTIMIZER, sources)
        write_state(partial, state)
        return digests

    weights = model.state_dict() if adapter is None else adapter_tensors(model)
    needed = 4 * sum(t.numel() for t in (*weights.values(), *moments.values()))
    return save_checkpoint(folder.parent, folder.name, fill, keep_last_n, needed_bytes=needed)


def restore(folder: Path, optimizer: AdamW, batches: Batches) -> int:
    """Load what `save` kept besides the weights; returns the step. Raises CheckpointError."""
    state = read_state(folder)
    file = SafetensorsFile(folder / OPTIMIZER)
    moments = optimizer.state_dict()
    if set(file.names) != set(moments):
        odd = sorted(set(file.names) ^ set(moments))
        raise CheckpointError(f"{folder / OPTIMIZER}: does not fit the model: {', '.join(odd[:5])}")
    for name, tensor in moments.items():
        array = file.float32(name)
        if array.shape != tensor.shape:
            raise WeightsError(f"{folder / OPTIMIZER}: {name}: {array.shape}, not {tensor.shape}")
        write(tensor, array)
        file.forget(name)
    batches.restore(state["data"])
    step = state["step"]
    assert isinstance(step, int)
    return step


def micro_batch_size(folder: Path) -> int | None:
    """The micro_batch_size that a checkpoint was trained with, if it says so."""
    size = read_state(folder).get("micro_batch_size")
    return size if isinstance(size, int) and size > 0 else None


def resume_folder(root: Path, asked: str, warn: Callable[[str], None]) -> Path:
    """The verified checkpoint to continue: `asked` is a folder, or "latest" for the newest."""
    if asked != "latest":
        if not Path(asked).is_dir():
            raise CheckpointError(f"--resume {asked}: no such folder")
        verify(asked)
        return Path(asked)
    folder = latest_valid(root, warn)
    if folder is None:
        raise CheckpointError(f"{root}: holds no checkpoint to resume from")
    return folder


def write_config(folder: Path, config: Config) -> None:
    """config.toml of the run: every option with the value it had."""
    atomic_write(folder / "config.toml", config.to_toml().encode())


def find_tokenizer(config: Config, resume: Path | None, show: bool) -> Tokenizer:
    """The run's tokenizer: the checkpoint's, a file, or one trained on the training text."""
    if resume is not None:
        return _tokenizer_of(resume, config)
    if config.tokenizer_source != "train":
        with naming("data.tokenizer" if config.data.tokenizer else "model.base"):
            return load_tokenizer(config.tokenizer_source)
    sources = find_sources(config.data.train_path)
    cache = Path(config.data.cache_dir)
    made_of = [f"{TRAINING} {config.tokenizer_vocab_size}", *content_digests(sources, cache)]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32]
    file = cache / f"tokenizer-{digest}" / MODEL_FILE
    if file.exists():
        return load_tokenizer(file)
    what = f"data.tokenizer_vocab_size, for a tokenizer of {config.data.train_path}"
    with naming(what, TokenizerError):  # what is wrong in the texts tells its own place
        texts = read_texts(sources, progress=show)
        return train_tokenizer(texts, config.tokenizer_vocab_size, file)


def _tokenizer_of(checkpoint: Path, config: Config) -> Tokenizer:
    """A checkpoint's tokenizer. Raises ConfigError if the configuration asks for another."""
    found, asked = load_tokenizer(checkpoint), config.data
    size = asked.tokenizer_vocab_size
    if asked.tokenizer not in (None, "train"):
        with naming("data.tokenizer"):
            same = load_tokenizer(str(asked.tokenizer)).model == found.model
        if not same:
            raise ConfigError(
                f"data.tokenizer: {asked.tokenizer} is not the tokenizer of {checkpoint}, which a"
                " resumed run must go on with"
            )
    elif config.tokenizer_source == "train" and size not in (None, found.vocab_size):
        raise ConfigError(
            f"data.tokenizer_vocab_size: got {size}, must be {found.vocab_size} as in {checkpoint}"
        )
    return found
