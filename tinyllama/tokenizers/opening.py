"""A tokenizer from what is on disk: a file, or the folder of a model."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from tinyllama.errors import TokenizerError
from tinyllama.formats.gguf import SUFFIX, read_metadata
from tinyllama.formats.models import local_path
from tinyllama.tokenizers.files import (
    JSON_FILE,
    MODEL_FILE,
    decode_json,
    read_file,
    read_files,
)
from tinyllama.tokenizers.gguf import VOCABULARY_KEY, files_of_gguf
from tinyllama.tokenizers.huggingface import JsonTokenizer
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer

_TEKKEN = "tekken.json"  # of Mistral's own library


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model's file (tokenizer.model), of a tokenizer.json, of a
    model's folder, or of a GGUF file.

    Raises TokenizerError if there is none, or it is damaged or of an unknown kind.
    """
    path = local_path(path)
    if path.is_dir():
        files = read_files(path)
        if (path / _TEKKEN).is_file() and not files.keys() & {MODEL_FILE, JSON_FILE}:
            raise TokenizerError(
                f"{path}: its {_TEKKEN} cannot be read: take the same model with a {JSON_FILE}"
            )
        return from_files(files, str(path))
    if path.suffix == SUFFIX:
        return from_files(files_of_gguf(read_metadata(path), str(path)), str(path))
    if path.suffix == ".json":
        beside = read_files(path.parent) if path.name == JSON_FILE else {}
        beside.pop(MODEL_FILE, None)
        return JsonTokenizer({**beside, JSON_FILE: read_file(path)}, str(path))
    return SentencePieceTokenizer(read_file(path), str(path))


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a model's folder or GGUF file has a tokenizer."""
    folder = local_path(folder)
    if folder.is_file() and folder.suffix == SUFFIX:
        return VOCABULARY_KEY in read_metadata(folder)
    return folder.is_file() or any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def from_files(files: Mapping[str, bytes], source: str) -> Tokenizer:
    """The tokenizer that consists of these files, by name. `source` names it in errors."""
    if MODEL_FILE in files and JSON_FILE in files:
        return _the_models(files, source) or JsonTokenizer(files, source)
    if MODEL_FILE in files:
        return SentencePieceTokenizer(files[MODEL_FILE], source, files)
    if JSON_FILE in files:
        return JsonTokenizer(files, source)
    raise TokenizerError(f"{source}: the folder holds neither {MODEL_FILE} nor {JSON_FILE}")


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _Added(msgspec.Struct):
    id: int
    content: str


class _JsonFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


def _the_models(files: Mapping[str, bytes], source: str) -> Tokenizer | None:
    """The tokenizer of the tokenizer.model, if that is a SentencePiece model with the pieces of the
    tokenizer.json. Models since LLaMA 3 carry a tokenizer.model of another kind; some that were
    fine-tuned carry that of their base."""
    try:
        in_json = decode_json(files[JSON_FILE], source, _JsonFile)
        tokenizer = SentencePieceTokenizer(files[MODEL_FILE], source, files)
    except TokenizerError:
        return None
    vocab = in_json.model.vocab
    numbers = vocab if isinstance(vocab, dict) else {p: n for n, (p, _) in enumerate(vocab)}
    numbers = numbers | {token.content: token.id for token in in_json.added_tokens}
    pieces = enumerate(tokenizer.pieces)
    return tokenizer if all(numbers.get(piece) == n for n, piece in pieces if piece) else None
