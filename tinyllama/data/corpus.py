"""Files of text -> tokens in one memory-mapped file, made once.

    (BOS, text, EOS) (BOS, text, EOS) ...        uint16, or uint32 for large vocabularies

The texts are cut into chunks of about 1 MiB, tokenized by several processes and written in their
order as they come, so memory does not grow with the text.

Both files of such a folder have sums, which are checked before a token is used; a folder that is
damaged, or was put there by a stranger, is made again.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
)
from tinyllama.errors import DataError, reason
from tinyllama.system import checked
from tinyllama.system.files import (
    atomic_directory,
    discard,
    make_folder,
    pieces_digest,
    remove_partials,
)
from tinyllama.system.json_files import read_json_file
from tinyllama.system.processes import ordered_map
from tinyllama.tokenizers.sentencepiece import Tokenizer

_TOKENS_FILE = "tokens.bin"
_META_FILE = "meta.json"
_SMALL_BYTES = 4 << 20  # tokenized sooner than processes start


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Tokens on disk: (BOS, text, EOS) for each document, one after another."""

    path: Path  # the folder; its name is a digest of the texts and the tokenizer
    tokens: npt.NDArray[Any]  # (n_tokens,) uint16 or uint32, memory-mapped, read-only
    n_documents: int
    n_empty: int  # rows and files without a character, left out
    text_bytes: int  # UTF-8 bytes of the texts, for bits per byte
    bos_id: int
    eos_id: int
    name: str  # the patterns it was made from, for errors

    @property
    def n_tokens(self) -> int:
        """With BOS and EOS of each document; n_tokens - n_documents of them have a target."""
        return len(self.tokens)

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
    Tokens whose sums do not hold are made again, which standard error says in one line. `progress`
    shows a bar. Raises DataError for texts that cannot be read, or a folder that
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
        dataset = _opened(folder, tokenizer)
        if dataset is None:
            make_folder(cache, 0o700)
            remove_partials(cache)
            try:
                _build(folder, sources, tokenizer, workers, progress)
            except FileExistsError:
                if _opened(folder, tokenizer) is None:  # else another run made it meanwhile
                    raise
            dataset = _opened(folder, tokenizer)
    except OSError as error:
        raise DataError(f"{cache}: cannot keep the tokens there: {reason(error)}") from error
    if dataset is None:
        raise DataError(f"{folder}: damaged while it was being written")
    if dataset.n_documents == 0:
        raise DataError(f"{name}: no text in it, {dataset.n_empty} empty rows or files")
    return replace(dataset, name=name)


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Meta(msgspec.Struct):
    """The contents of meta.json; `digest` is that of the tokens, `sum` that of all the rest."""

    dtype: Literal["uint16", "uint32"]
    n_tokens: _Count
    n_documents: _Count
    n_empty: _Count
    text_bytes: _Count
    bos_id: _Count
    eos_id: _Count
    digest: str
    sum: str

    def summed(self) -> str:
        rest = msgspec.json.encode(msgspec.structs.replace(self, sum=""))
        return hashlib.blake2b(rest, digest_size=32).hexdigest()


class _Encoded(NamedTuple):
    tokens: npt.NDArray[Any]
    n_documents: int
    n_empty: int
    text_bytes: int
    read_bytes: int


class _Encoder:
    """Chunk -> tokens; built once in each process."""

    def __init__(self, model: bytes, dtype: str) -> None:
        self._tokenizer = Tokenizer(model)
        self._dtype = dtype

    def __call__(self, chunk: Chunk) -> _Encoded:
        tokenizer, has_rows = self._tokenizer, chunk.source.has_rows
        ids: list[int] = []
        n_documents = n_empty = text_bytes = 0
        for text in read_chunk(chunk):
            begins, ends = has_rows or chunk.start == 0, has_rows or chunk.is_last
            if begins and ends and not text:
                n_empty += 1
                continue
            ids += [tokenizer.bos_id] * begins
            ids += tokenizer.encode(text, continued=not begins)
            ids += [tokenizer.eos_id] * ends
            n_documents += ends
            text_bytes += len(text.encode())
        tokens = np.array(ids, self._dtype)
        return _Encoded(tokens, n_documents, n_empty, text_bytes, chunk.end - chunk.start)


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
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = _Meta(dtype, 0, 0, 0, 0, tokenizer.bos_id, tokenizer.eos_id, "", "")
    chunks = (chunk for source in sources for chunk in cut(source))
    with atomic_directory(folder) as made, progress_bar(sources, "Tokenizing", progress) as bar:
        with open(made / _TOKENS_FILE, "wb") as file:
            for part in ordered_map(partial(_Encoder, tokenizer.model, dtype), chunks, workers):
                file.write(part.tokens.data)
                meta.n_tokens += len(part.tokens)
                meta.n_documents += part.n_documents
                meta.n_empty += part.n_empty
                meta.text_bytes += part.text_bytes
                bar.update(part.read_bytes)
        for source in sources:
            source.check_unchanged()
        meta.digest = pieces_digest(made / _TOKENS_FILE)
        meta.sum = meta.summed()
        (made / _META_FILE).write_bytes(msgspec.json.encode(meta))


def _opened(folder: Path, tokenizer: Tokenizer) -> TokenDataset | None:
    """The dataset in `folder`; None if there is none, or a damaged one, which is removed."""
    if not os.path.lexists(folder):
        return None
    try:
        return _open(folder, tokenizer)
    except DataError as error:
        print(f"{error}; the text is tokenized again", file=sys.stderr)
        with suppress(FileNotFoundError):  # another run removes it too
            discard(folder)
        return None


def _open(folder: Path, tokenizer: Tokenizer) -> TokenDataset:
    """The dataset in `folder`. Raises DataError where it is not as `_build` wrote it."""
    file = folder / _TOKENS_FILE
    meta = read_json_file(folder / _META_FILE, _Meta, DataError)
    if meta.sum != meta.summed():
        raise DataError(f"{folder / _META_FILE}: damaged: its sum of itself does not hold")
    if folder.is_symlink() or file.is_symlink() or not file.is_file():
        raise DataError(f"{file}: missing, or a link")
    if file.stat().st_size != meta.n_tokens * np.dtype(meta.dtype).itemsize:
        raise DataError(f"{file}: damaged: {file.stat().st_size} bytes for {meta.n_tokens} tokens")
    bound = tokenizer.vocab_size
    if max(meta.bos_id, meta.eos_id) >= bound:
        raise DataError(f"{folder / _META_FILE}: not of this tokenizer")
    take = partial(_digest, file, meta.dtype, bound)
    if checked.digest(f"tokens below {bound}", [file], take) != meta.digest:
        raise DataError(f"{file}: damaged: its sum does not hold")
    tokens: npt.NDArray[Any] = np.zeros(0, meta.dtype)
    if meta.n_tokens:
        tokens = np.memmap(file, meta.dtype, mode="r")
    return TokenDataset(
        path=folder,
        tokens=tokens,
        n_documents=meta.n_documents,
        n_empty=meta.n_empty,
        text_bytes=meta.text_bytes,
        bos_id=meta.bos_id,
        eos_id=meta.eos_id,
        name=str(folder),
    )


def _digest(file: Path, dtype: str, bound: int) -> str:
    """The digest of a file of tokens. A sum proves no origin, and an id past the vocabulary would
    be read past the embeddings: raises DataError for one of `bound` or more."""

    def check(data: memoryview) -> None:
        ids = np.frombuffer(data, dtype)
        if len(ids) and ids.max() >= bound:
            raise DataError(f"{file}: not of this tokenizer: it holds the id {ids.max()}")

    return pieces_digest(file, check)
