"""A tokenizer from what is on disk: a file, or the folder of a model."""

from collections.abc import Mapping
from pathlib import Path

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.files import JSON_FILE, MODEL_FILE, read_file, read_files
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model's file (tokenizer.model), of a tokenizer.json, of a
    model's folder, or of a GGUF file.

    Raises TokenizerError if there is none, or it is damaged or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        return from_files(read_files(path), str(path))
    name = JSON_FILE if path.suffix == ".json" else MODEL_FILE
    return from_files({name: read_file(path)}, str(path))


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a model's folder (or GGUF file) has a tokenizer."""
    folder = Path(folder)
    return folder.is_file() or any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def from_files(files: Mapping[str, bytes], source: str) -> Tokenizer:
    """The tokenizer that consists of these files, by name. `source` names it in errors."""
    if MODEL_FILE in files:
        return SentencePieceTokenizer(files[MODEL_FILE], source, files)
    raise TokenizerError(f"{source}: the folder holds no {MODEL_FILE}")
