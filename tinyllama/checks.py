"""What is refused before a run makes anything: an old run's folder, no text, what is not built."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from tinyllama import runs
from tinyllama.config import Config
from tinyllama.errors import CheckpointError, ConfigError, DataError, naming
from tinyllama.schema import got, shown
from tinyllama.sources import find_sources


def check_fresh(config: Config) -> None:
    """A new run gets a folder of its own: CheckpointError if it holds checkpoints or a run."""
    folder = Path(config.checkpointing.checkpoint_dir)
    runs.settle(folder)
    runs.check_holds_none(folder)


def check_files(config: Config) -> None:
    """What a run reads is there, and its folder can be written: DataError or CheckpointError."""
    with naming("data.train_path"):
        find_sources(config.data.train_path)
    if config.data.val_path is not None:
        find_validation(config.data.val_path)
    folder = Path(config.checkpointing.checkpoint_dir)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CheckpointError(
            f"checkpointing.checkpoint_dir: {folder} cannot be written: {error.strerror}"
        ) from error


def find_validation(paths: str | Sequence[str]) -> None:
    """DataError, with what to do, if there is no validation text."""
    try:
        find_sources(paths)
    except DataError as error:
        raise DataError(
            f"{error} (data.val_path names it; --set data.val_path=none trains without validation)"
        ) from None


def supported(config: Config) -> Config:
    """The configuration, if all that it asks for can be done; ConfigError names what cannot."""
    if config.lora is not None and config.model.base is None:
        raise ConfigError(
            "[lora]: adapters are trained on a checkpoint: name its folder with model.base in the "
            "file or --set model.base=DIR, or remove the section to train a whole model"
        )
    t, data = config.training, config.data
    problems = [
        f"{config.where(key)}: {got(value, f'{shown(only)} for now')}"
        for key, value, only in (
            ("training.devices", t.devices, 1),
            ("training.beam", t.beam, 0),
            ("data.train_on", data.train_on, "all"),
        )
        if value != only
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def without_effect(config: Config, sequences: int, steps: int) -> list[str]:
    """Sizes that a run of so many `steps` over so many `sequences` of text does not reach."""
    t, warmup, found = config.training, config.lr_schedule.warmup_steps, []
    if t.batch_size > sequences:
        found.append(
            f"training.batch_size is {t.batch_size}, and the text fills {sequences} sequences: the"
            " rest of each batch is empty"
        )
    if warmup > steps:
        found.append(
            f"lr_schedule.warmup_steps is {warmup}, and the run has {steps} steps: the learning"
            f" rate rises to {t.learning_rate * steps / warmup:.2g} only"
        )
    return found
