"""What is refused before a run makes anything: an old run's folder, no text, what is not built."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from tinyllama import runs
from tinyllama.config import Config
from tinyllama.errors import CheckpointError, ConfigError, DataError
from tinyllama.schema import got, shown
from tinyllama.sources import find_sources


def check_fresh(config: Config) -> None:
    """A new run gets a folder of its own: CheckpointError if it holds checkpoints or a run."""
    folder = Path(config.checkpointing.checkpoint_dir)
    runs.settle(folder)
    runs.check_holds_none(folder)


def check_files(config: Config) -> None:
    """What a run reads is there, and its folder can be written: DataError or CheckpointError."""
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
        f"{key}: {got(value, f'{shown(only)} for now')}"
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
