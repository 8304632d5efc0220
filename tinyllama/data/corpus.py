"""Files of text -> tokens in one memory-mapped file, made once.

    (BOS, text, EOS) (BOS, text, EOS) ...   tokens.bin: uint16, or uint32 for large vocabularies
    ^                ^                      documents.bin: int64, the index of each first token

BOS is left out where the tokenizer adds none.

The texts are cut into chunks of about 1 MiB, tokenized by several processes and written in their
order as they come, so memory does not grow with the text.

Both files of such a folder have sums, which are checked before a token is used; a folder that is
damaged, or was put there by a stranger, is made again.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
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
    read_joined,
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
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.tokenizer import Tokenizer

_TOKENS_FILE = "tokens.bin"
_DOCUMENTS_FILE = "documents.bin"
_META_FILE = "meta.json"
_BLOCK = 1 << 20  # documents whose places are compared at once
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
    special_tokens: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> TokenDataset:
    """The texts that `patterns` name (see find_sources), as tokens in a folder of `cache_dir`.

    They are tokenized once: the folder's name is a digest of the texts and of the tokenizer, and
    it appears only when it is whole. The tokens do not depend on the number of `workers` (None:
    one per processor, or none for a few MB), the memory does not depend on the size of the texts.
    Tokens whose sums do not hold are made again, which standard error says in one line. Special
    tokens written in rows are these tokens if `special_tokens` and the tokenizer has markup; in
    plain text files they are text. `progress` shows a bar. Raises DataError for texts that cannot
    be read, or a folder that cannot be written.
    """
    sources = find_sources(patterns)
    name = patterns if isinstance(patterns, str) else ", ".join(patterns)
    if workers is None:
        is_small = sum(source.size_bytes for source in sources) < _SMALL_BYTES
        workers = 1 if is_small else os.cpu_count() or 1
    cache, as_text = Path(cache_dir), tokenizer.has_markup and not special_tokens
    try:
        folder = cache / _make_key(content_digests(sources, cache), sources, tokenizer, as_text)
        dataset = _opened(folder, tokenizer)
        if dataset is None:
            make_folder(cache, 0o700)
            remove_partials(cache)
            try:
                _build(folder, sources, tokenizer, as_text, workers, progress)
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


class _Meta(msgspec.Struct, omit_defaults=True):
    """The contents of meta.json; `digest` and `documents` are those of the tokens and of where the
    documents begin, `sum` that of all the rest."""

    dtype: Literal["uint16", "uint32"]
    n_tokens: _Count
    n_documents: _Count
    n_empty: _Count
    text_bytes: _Count
    bos_id: _Count | None
    eos_id: _Count
    digest: str
    sum: str
    documents: str = ""  # none in folders of earlier versions

    def summed(self) -> str:
        rest = msgspec.json.encode(msgspec.structs.replace(self, sum=""))
        return hashlib.blake2b(rest, digest_size=32).hexdigest()


class _Encoded(NamedTuple):
    tokens: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]  # of documents, counted from the chunk's first token
    n_empty: int
    text_bytes: int
    read_bytes: int


class _Encoder:
    """Chunk -> tokens; built once in each process."""

    def __init__(self, files: Mapping[str, bytes], dtype: str, as_text: bool = False) -> None:
        """`as_text`: special tokens written in rows are text."""
        self._tokenizer = from_files(files, "tokenizer")
        self._dtype, self._as_text = dtype, as_text

    def __call__(self, chunk: Chunk) -> _Encoded:
        tokenizer, has_rows = self._tokenizer, chunk.source.has_rows
        special = has_rows and tokenizer.has_markup and not self._as_text
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


def _make_key(
    digests: Sequence[str], sources: Sequence[Source], tokenizer: Tokenizer, as_text: bool
) -> str:
    """A digest of all that decides the tokens; not of names and dates, so that files can move."""
    # True and False as in earlier versions, so that their tokens are still used.
    read_as = {"text": False, "jsonl": True}
    files = [
        (read_as.get(source.format, source.format), digest)
        for source, digest in zip(sources, digests, strict=True)
    ]
    made_of = [tokenizer.ids_version, tokenizer.fingerprint, files]
    made_of += ["special tokens are text"] * (as_text and any(s.has_rows for s in sources))
    return hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:32]


def _build(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    as_text: bool,
    workers: int,
    progress: bool,
) -> None:
    """Tokenize the sources into `folder`, which appears only when it is whole."""
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = _Meta(dtype, 0, 0, 0, 0, tokenizer.bos_id, tokenizer.eos_id, "", "")
    chunks = (chunk for source in sources for chunk in cut(source))
    make = partial(_Encoder, tokenizer.sources, dtype, as_text)
    with atomic_directory(folder) as made, progress_bar(sources, "Tokenizing", progress) as bar:
        with (
            open(made / _TOKENS_FILE, "wb") as file,
            open(made / _DOCUMENTS_FILE, "wb") as documents,
        ):
            for part in ordered_map(make, chunks, workers):
                file.write(part.tokens.data)
                documents.write((part.starts + meta.n_tokens).data)
                meta.n_tokens += len(part.tokens)
                meta.n_documents += len(part.starts)
                meta.n_empty += part.n_empty
                meta.text_bytes += part.text_bytes
                bar.update(part.read_bytes)
        for source in sources:
            source.check_unchanged()
        meta.digest = pieces_digest(made / _TOKENS_FILE)
        meta.documents = pieces_digest(made / _DOCUMENTS_FILE)
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
    if max(meta.bos_id or 0, meta.eos_id) >= bound:
        raise DataError(f"{folder / _META_FILE}: not of this tokenizer")
    take = partial(_digest, file, meta.dtype, bound)
    if checked.digest(f"tokens below {bound}", [file], take) != meta.digest:
        raise DataError(f"{file}: damaged: its sum does not hold")
    tokens = _mapped(file, meta.dtype, meta.n_tokens)
    return TokenDataset(
        path=folder,
        tokens=tokens,
        starts=_starts(folder / _DOCUMENTS_FILE, tokens, meta),
        n_empty=meta.n_empty,
        text_bytes=meta.text_bytes,
        eos_id=meta.eos_id,
        name=str(folder),
    )


def _starts(path: Path, tokens: npt.NDArray[Any], meta: _Meta) -> npt.NDArray[np.int64]:
    """Where the documents begin. Folders of earlier versions have no such file: there each begins
    with a BOS, which no text contains. Raises DataError."""
    if not meta.documents:
        starts = np.flatnonzero(tokens == meta.bos_id)
        if len(starts) != meta.n_documents:
            raise DataError(
                f"{path.parent}: damaged: {len(starts)} of {meta.n_documents} documents"
            )
        return starts
    if path.is_symlink() or not path.is_file() or path.stat().st_size != 8 * meta.n_documents:
        raise DataError(f"{path}: damaged, missing or a link")
    if checked.digest("documents", [path], partial(pieces_digest, path)) != meta.documents:
        raise DataError(f"{path}: damaged: its sum does not hold")
    starts = _mapped(path, "int64", meta.n_documents)
    for first in range(0, len(starts), _BLOCK):  # a sum proves no origin
        block = starts[first : first + _BLOCK + 1]
        if block[0] < 0 or block[-1] >= meta.n_tokens or (np.diff(block) <= 0).any():
            raise DataError(f"{path}: damaged: places of documents that do not rise")
    return starts


def _mapped(path: Path, dtype: str, count: int) -> npt.NDArray[Any]:
    """The numbers in a file, read when used."""
    return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)


def _digest(file: Path, dtype: str, bound: int) -> str:
    """The digest of a file of tokens. A sum proves no origin, and an id past the vocabulary would
    be read past the embeddings: raises DataError for one of `bound` or more."""

    def check(data: memoryview) -> None:
        ids = np.frombuffer(data, dtype)
        if len(ids) and ids.max() >= bound:
            raise DataError(f"{file}: not of this tokenizer: it holds the id {ids.max()}")

    return pieces_digest(file, check)
