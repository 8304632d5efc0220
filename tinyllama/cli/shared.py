"""What several commands do: the options --set and --threads, the device, loading a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.errors import ConfigError, DeviceError
from tinyllama.system import device

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizers.sentencepiece import Tokenizer


def add_set(parser: argparse.ArgumentParser) -> None:
    """--set SECTION.KEY=VALUE, any number of times."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override an option of the configuration; may be given several times",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads N."""
    parser.add_argument("--threads", type=int, help="threads of CPU kernels (default: every core)")


def select_device(threads: int | None) -> device.DeviceChoice:
    """The device to compute on. Raises DeviceError, also for one that only compiles."""
    choice = device.select(threads=threads)
    if choice.device == "NULL":
        raise DeviceError(
            f"{choice.reason}: NULL compiles kernels and runs none, so it gives no "
            "numbers; for those choose one of `tinyllama backends`"
        )
    return choice


def load(folder: Path) -> "tuple[Tokenizer, Llama]":
    """The tokenizer and the model of a folder. Raises ConfigError if they do not fit."""
    from tinyllama.model.build import load_model, tokenizer_folder
    from tinyllama.tokenizers.sentencepiece import load_tokenizer

    tokenizer, model = load_tokenizer(tokenizer_folder(folder)), load_model(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} entries, must be at most the "
            f"model's {model.config.vocab_size}"
        )
    return tokenizer, model


def to_stderr(message: str) -> None:
    """Print a line that is no result."""
    print(message, file=sys.stderr, flush=True)
