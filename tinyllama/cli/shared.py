"""What several commands do: the options --set and --threads, the device, loading a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import path
from tinyllama.errors import ConfigError, DeviceError
from tinyllama.system import device
from tinyllama.system.notices import to_stderr

if TYPE_CHECKING:
    from tinyllama.data.conversations import Form
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizers.tokenizer import Tokenizer


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


def add_form(parser: argparse.ArgumentParser) -> None:
    """--template and --train-on."""
    parser.add_argument(
        "--template",
        choices=("chatml", "llama2", "llama3", "alpaca", "none"),
        help="how conversations are written as text (default: the model's chat template)",
    )
    parser.add_argument(
        "--train-on",
        choices=("all", "assistant", "last"),
        help="tokens of conversations that count (default: the assistant's; of text all)",
    )


def form_of(options: argparse.Namespace) -> "Form":
    """What add_form's options say."""
    from tinyllama.data.conversations import Form

    return Form(options.template, options.train_on)


def select_device(threads: int | None) -> device.DeviceChoice:
    """The device to compute on. Raises DeviceError, also for one that only compiles."""
    choice = device.select(threads=threads)
    if choice.device == "NULL":
        raise DeviceError(
            f"{choice.reason}: NULL compiles kernels and runs none, so it gives no "
            "numbers; for those choose one of `tinyllama backends`"
        )
    return choice


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model and --base."""
    parser.add_argument(
        "--model",
        required=True,
        type=path,
        metavar="FOLDER",
        help="folder of a checkpoint, of an adapter or of a run; of a run its final/ is taken, or"
        " else its newest step",
    )
    parser.add_argument(
        "--base",
        type=path,
        metavar="FOLDER",
        help="where an adapter's base is (default: where it was in training)",
    )


def model_folder(folder: Path) -> Path:
    """A model's folder or GGUF file: `folder` itself, the final or newest checkpoint of a run's
    folder, or what a name on the hub stands for.

    Raises ConfigError where there is no folder of that name.
    """
    from tinyllama.formats.models import local_path

    folder = local_path(folder)
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if not folder.is_dir():
        problem = "is a file, must be the folder of a model or end in .gguf"
        if folder.suffix == ".gguf":
            problem = "is no regular file"
        raise ConfigError(f"{folder}: {problem if folder.exists() else 'no such file or folder'}")
    names = ("config.json", "adapter_config.json", "params.json")
    if any((folder / name).exists() for name in names):
        return folder
    from tinyllama.train.checkpoint import list_checkpoints, looks_whole

    checkpoints = [inside for inside in list_checkpoints(folder) if looks_whole(inside)]
    if not checkpoints:
        raise ConfigError(f"{folder}: holds neither a model nor a checkpoint of a run")
    final = folder / "final"
    chosen = final if final in checkpoints else checkpoints[-1]
    to_stderr(f"{folder} is a run: {chosen.name} is used")
    return chosen


def load(folder: Path, base: Path | None) -> "tuple[Tokenizer, Llama]":
    """The tokenizer and the model of a folder, an adapter's on `base` or on the base that it names.

    Sums are checked while the model is read. Raises ConfigError if they do not fit, and
    CheckpointError for a checkpoint of ours that is damaged.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tinyllama.model.build import load_model, tokenizer_folder
    from tinyllama.tokenizers.opening import open_tokenizer
    from tinyllama.train.prepare import unused_rows

    folder = model_folder(folder)
    with ThreadPoolExecutor(1) as checking:
        checked = checking.submit(verify_model, folder, base)
        try:
            tokenizer = open_tokenizer(tokenizer_folder(folder, base))
            model = load_model(folder, base=base)
        finally:  # what is damaged is the reason, whatever else it led to
            checked.result()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} entries, must be at most the "
            f"model's {model.config.vocab_size}"
        )
    if notice := unused_rows(model.config.vocab_size, tokenizer):
        to_stderr(notice)
    return tokenizer, model


def verify_model(folder: Path, base: Path | None = None, *, remembered: bool = True) -> None:
    """Compare a model, and the base of an adapter, with the sums that checkpoints of ours have.

    Raises CheckpointError.
    """
    from tinyllama.formats.peft import AdapterFolder, is_adapter
    from tinyllama.train.manifest import verify_loaded

    verify_loaded(folder, remembered=remembered)
    if is_adapter(folder):
        verify_loaded(base or AdapterFolder(folder).base_folder(), remembered=remembered)
