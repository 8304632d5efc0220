"""Files of text -> tokens in one memory-mapped file, made once.

    (BOS, text, EOS) (BOS, text, EOS) ...   tokens.bin: uint16, or uint32 for large vocabularies
    ^                ^                      documents.bin: int64, the index of each first token

BOS is left out where the tokenizer adds none.

The texts are cut into chunks of about 1 MiB, tokenized by several processes and written in their
order as they come, so memory does not grow with the text.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.data.files import (
    Chunk,
    Source,
    content_digests,
    cut,
    find_sources,
    progress_bar,
    read_chunk,
    read_joined,
)
from tinyllama.errors import DataError, reason
from tinyllama.system.files import atomic_directory, remove_partials
from tinyllama.system.processes import ordered_map
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.tokenizer import Tokenizer

_TOKENS_FILE = "tokens.bin"
_DOCUMENTS_FILE = "documents.bin"
_META_FILE = "meta.json"
_SMALL_BYTES = 4 << 20  # tokenized sooner than processes start


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Tokens on disk: (BOS, text, EOS) for each document, one after another."""

    path: Path  # the folder; its name is a digest of the texts and the tokenizer
    tokens: npt.NDArray[Any]  # (n_tokens,) uint16 or uint32, memory-mapped, read-only
    starts: npt.NDArray[np.int64]  # (n_documents,) the index of each document's first token
    n_empty: int  # rows and files without a character, left out
    text_bytes: int  # UTF-8 bytes of the texts, for bits per byte
    eos_id: int
    name: str  # the patterns it was made from, for errors

    @property
    def n_tokens(self) -> int:
        """With BOS and EOS of each document; n_tokens - n_documents of them have a target."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Rows and files that hold text."""
        return len(self.starts)

    def window_count(self, context_length: int, stride: int | None = None) -> int:
        """Windows, `stride` tokens apart (a context, if not given), that hold all tokens; the very
        last one, which has no target, needs none."""
        stride = stride or context_length
        targets = self.n_tokens - 1
        return max(min(targets, 1), -(-(targets - context_length + stride) // stride))


def prepare(
    patterns: str | Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> TokenDataset:
    """The texts that `patterns` name (see find_sources), as tokens in a folder of `cache_dir`.

    They are tokenized once: the folder's name is a digest of the texts and of the tokenizer, and
    it appears only when it is whole. The tokens do not depend on the number of `workers` (None:
    one per processor, or none for a few MB), the memory does not depend on the size of the texts.
    `progress` shows a bar. Raises DataError for texts that cannot be read, or a folder that
    cannot be written.
    """
    sources = find_sources(patterns)
    name = patterns if isinstance(patterns, str) else ", ".join(patterns)
    if workers is None:
        is_small = sum(source.size_bytes for source in sources) < _SMALL_BYTES
        workers = 1 if is_small else os.cpu_count() or 1
    cache = Path(cache_dir)
    try:
        folder = cache / _make_key(content_digests(sources, cache), sources, tokenizer)
        dataset = _open(folder)
        if dataset is None:
            remove_partials(cache)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            try:
                _build(folder, sources, tokenizer, workers, progress)
            except FileExistsError:
                if _open(folder) is None:  # else another run made it meanwhile
                    raise
            dataset = _open(folder)
    except OSError as error:
        raise DataError(f"{cache}: cannot keep the tokens there: {reason(error)}") from error
    if dataset is None:
        raise DataError(f"{folder}: damaged while it was being written")
    if dataset.n_documents == 0:
        raise DataError(f"{name}: no text in it, {dataset.n_empty} empty rows or files")
    return replace(dataset, name=name)


class _Meta(msgspec.Struct):
    """The contents of meta.json."""

    dtype: str
    n_tokens: int
    n_documents: int
    n_empty: int
    text_bytes: int
    bos_id: int | None
    eos_id: int


class _Encoded(NamedTuple):
    tokens: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]  # of documents, counted from the chunk's first token
    n_empty: int
    text_bytes: int
    read_bytes: int


class _Encoder:
    """Chunk -> tokens; built once in each process."""

    def __init__(self, files: Mapping[str, bytes], dtype: str) -> None:
        self._tokenizer = from_files(files, "tokenizer")
        self._dtype = dtype

    def __call__(self, chunk: Chunk) -> _Encoded:
        tokenizer, has_rows = self._tokenizer, chunk.source.has_rows
        special = has_rows and tokenizer.has_markup
        ids: list[int] = []
        starts: list[int] = []
        n_empty = text_bytes = 0
        for text in self._texts(chunk):
            begins, ends = has_rows or chunk.start == 0, has_rows or chunk.is_last
            if begins and ends and not text:
                n_empty += 1
                continue
            if begins:
                starts.append(len(ids))
                ids += tokenizer.begin
            ids += tokenizer.encode(text, continued=not begins, special=special)
            ids += [tokenizer.eos_id] * ends
            text_bytes += len(text.encode())
        tokens, documents = np.array(ids, self._dtype), np.array(starts, np.int64)
        return _Encoded(tokens, documents, n_empty, text_bytes, chunk.end - chunk.start)

    def _texts(self, chunk: Chunk) -> list[str]:
        """The texts of a chunk; a part of a document ends where the tokenizer can be cut."""
        joint = self._tokenizer.joint
        is_whole = chunk.start == 0 and chunk.is_last
        if chunk.source.has_rows or is_whole or joint is None:
            return read_chunk(chunk)
        return [read_joined(chunk, joint)]


def _make_key(digests: Sequence[str], sources: Sequence[Source], tokenizer: Tokenizer) -> str:
    """A digest of all that decides the tokens; not of names and dates, so that files can move."""
    # True and False as in earlier versions, so that their tokens are still used.
    read_as = {"text": False, "jsonl": True}
    files = [
        (read_as.get(source.format, source.format), digest)
        for source, digest in zip(sources, digests, strict=True)
    ]
    made_of = msgspec.json.encode([tokenizer.ids_version, tokenizer.fingerprint, files])
    return hashlib.sha256(made_of).hexdigest()[:32]


def _build(
    folder: Path, sources: Sequence[Source], tokenizer: Tokenizer, workers: int, progress: bool
) -> None:
    """Tokenize the sources into `folder`, which appears only when it is whole."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = _Meta(dtype, 0, 0, 0, 0, tokenizer.bos_id, tokenizer.eos_id)
    chunks = (chunk for source in sources for chunk in cut(source))
    with atomic_directory(folder) as made, progress_bar(sources, "Tokenizing", progress) as bar:
        with (
            open(made / _TOKENS_FILE, "wb") as file,
            open(made / _DOCUMENTS_FILE, "wb") as documents,
        ):
            for part in ordered_map(partial(_Encoder, tokenizer.sources, dtype), chunks, workers):
                file.write(part.tokens.data)
                documents.write((part.starts + meta.n_tokens).data)
                meta.n_tokens += len(part.tokens)
                meta.n_documents += len(part.starts)
                meta.n_empty += part.n_empty
                meta.text_bytes += part.text_bytes
                bar.update(part.read_bytes)
        for source in sources:
            source.check_unchanged()
        (made / _META_FILE).write_bytes(msgspec.json.encode(meta))


def _open(folder: Path) -> TokenDataset | None:
    """The dataset in `folder`; None if it is missing or damaged."""
    try:
        meta = msgspec.json.decode((folder / _META_FILE).read_bytes(), type=_Meta)
        size = (folder / _TOKENS_FILE).stat().st_size
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    if size != meta.n_tokens * np.dtype(meta.dtype).itemsize:
        return None
    tokens = _mapped(folder / _TOKENS_FILE, meta.dtype)
    starts = _starts(folder / _DOCUMENTS_FILE, tokens, meta)
    if len(starts) != meta.n_documents:
        return None
    return TokenDataset(
        path=folder,
        tokens=tokens,
        starts=starts,
        n_empty=meta.n_empty,
        text_bytes=meta.text_bytes,
        eos_id=meta.eos_id,
        name=str(folder),
    )


def _starts(path: Path, tokens: npt.NDArray[Any], meta: _Meta) -> npt.NDArray[np.int64]:
    """Where the documents begin. Folders of earlier versions have no such file: there each begins
    with a BOS, which no text contains."""
    if not path.is_file():
        return np.flatnonzero(tokens == meta.bos_id)
    if path.stat().st_size % 8:
        return np.zeros(0, np.int64)  # damaged
    return _mapped(path, "int64")


def _mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    """The numbers in a file, read when used."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
