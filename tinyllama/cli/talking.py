"""What chat and serve share: the model as a word, and adapters by their names."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import count, path
from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from tinyllama.tokenizers.templates import ChatTemplate
    from tinyllama.tokenizers.tokenizer import Tokenizer


def add_model_word(parser: argparse.ArgumentParser) -> None:
    """MODEL, --base, --template and --context."""
    parser.add_argument(
        "model",
        type=path,
        metavar="MODEL",
        help="folder of a checkpoint, of an adapter or of a run, a .gguf file, or a hub name",
    )
    parser.add_argument(
        "--base",
        type=path,
        metavar="FOLDER",
        help="where an adapter's base is (default: where it was in training)",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chatml, llama2, llama3, alpaca or none (default: the model's own)",
    )
    parser.add_argument(
        "--context",
        type=count,
        metavar="TOKENS",
        help="most tokens of a prompt and its answer (default: the model's own, at most 4096)",
    )


def context_length(wanted: int | None, longest: int, option: str = "--context") -> int:
    """The tokens of context. Raises ConfigError for more than the model's."""
    if wanted is not None and wanted > longest:
        raise ConfigError(f"{option}: got {wanted}, must be at most the model's {longest}")
    return wanted or min(longest, 4096)


def named_adapters(words: list[str]) -> dict[str, Path]:
    """The adapters of --adapter NAME=FOLDER by their names. Raises ConfigError."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter: got {word!r}, must be NAME=FOLDER")
        if name in found:
            raise ConfigError(f"--adapter: the name {name!r} is given twice")
        found[name] = path(folder)
    return found


def template_of(tokenizer: "Tokenizer", name: str | None) -> "ChatTemplate":
    """The template to talk with; see conversation.chat_template."""
    from tinyllama.generate.conversation import chat_template

    return chat_template(tokenizer, name)
