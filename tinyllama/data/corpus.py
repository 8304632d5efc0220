"""Files of text -> tokens in one memory-mapped file, made once.

    (BOS, text, EOS) (BOS, text, EOS) ...   tokens.bin: uint16, or uint32 for large vocabularies
    ^                ^                      documents.bin: int64, the index of each first token

BOS is left out where the tokenizer adds none.

The texts are cut into chunks of about 1 MiB, tokenized by several processes and written in their
order as they come, so memory does not grow with the text.

Conversations are tokenized as their template says, without a begin and an end of our own, and a
third file, trained.bin, holds a byte per token:

    0    not trained, as what a user says
    1    trained; of a document's first token, which is no target: it may go on in another row
         (text does, and a conversation is cut at the end of its row)

The files of such a folder have sums, which are checked before a token is used; a folder that is
damaged, or was put there by a stranger, is made again.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.data.conversations import OWN, Conversation, Form
from tinyllama.data.conversations import Encoder as ConversationEncoder
from tinyllama.data.files import (
    Chunk,
    Source,
    bytes_bar,
    content_digests,
    cut,
    find_sources,
    read_chunk,
    read_joined,
    read_rows,
    unpacked,
)
from tinyllama.data.kept import opened, opened_or_made
from tinyllama.errors import DataError, reason
from tinyllama.system import checked
from tinyllama.system.files import (
    atomic_directory,
    pieces_digest,
)
from tinyllama.system.processes import ordered_map
from tinyllama.system.untrusted import read_json_file
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.templates import NAMED, Encoded
from tinyllama.tokenizers.tokenizer import Tokenizer

_TOKENS_FILE = "tokens.bin"
_DOCUMENTS_FILE = "documents.bin"
_TRAINED_FILE = "trained.bin"
_META_FILE = "meta.json"
_FORM_VERSION = 1  # changes when the same conversations give other ids or another mask
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
    trained: npt.NDArray[np.uint8] | None = None  # (n_tokens,) see above; None: all are
    n_dropped: int = 0  # conversations without a trained token, left out

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


@dataclass(frozen=True)
class Part:
    """The rows whose hash, as a fraction of 1, is below `fraction`, or (`rest`) all others. The
    hash is that of what a row says: rows that say the same are on the same side."""

    fraction: float
    rest: bool

    def holds(self, content: bytes) -> bool:
        """Whether a row that says this belongs to the part."""
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        return (number < self.fraction * 2.0**64) != self.rest

    def leaves_nothing(self) -> str:
        """The reason why no row is in the part."""
        side = "training" if self.rest else "validation"
        return f"data.val_fraction = {self.fraction} leaves no row for {side}"


class _Way(NamedTuple):
    """How rows become documents. `as_text`: special tokens written in rows of text are text."""

    as_text: bool = False
    form: Form = OWN
    part: Part | None = None


_PLAIN = _Way()


def prepare(
    patterns: str | Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    special_tokens: bool = True,
    form: Form = OWN,
    part: Part | None = None,
    workers: int | None = None,
    progress: bool = True,
    make: bool = True,
) -> TokenDataset:
    """The texts that `patterns` name (see find_sources), as tokens in a folder of `cache_dir`.

    They are tokenized once: the folder's name is a digest of the texts and of the tokenizer, and
    it appears only when it is whole. The tokens do not depend on the number of `workers` (None:
    one per processor, or none for a few MB), the memory does not depend on the size of the texts.
    Tokens whose sums do not hold are made again, which standard error says in one line. Special
    tokens written in rows are these tokens if `special_tokens` and the tokenizer has markup; in
    plain text files they are text. `form` says how conversations become tokens; `part` takes some
    of the rows. `progress` shows a bar. Raises DataError for texts that cannot be read, a folder
    that cannot be written, and, without `make`, for texts whose tokens are not kept.
    """
    sources = find_sources(patterns)
    _check_form(sources, form, part)
    name = patterns if isinstance(patterns, str) else ", ".join(patterns)
    if workers is None:
        is_small = sum(source.size_bytes for source in sources) < _SMALL_BYTES
        workers = 1 if is_small else os.cpu_count() or 1
    cache = Path(cache_dir)
    way = _Way(tokenizer.has_markup and not special_tokens, form, part)
    try:
        folder = cache / _make_key(content_digests(sources, cache), sources, tokenizer, way)
        if not make and not folder.is_dir():
            raise DataError(f"{name}: its tokens are not in {cache}")
        dataset = opened_or_made(
            folder,
            lambda: _opened(folder, tokenizer),
            lambda: _build(folder, sources, tokenizer, way, workers, progress),
        )
    except OSError as error:
        raise DataError(f"{cache}: cannot keep the tokens there: {reason(error)}") from error
    if dataset.n_documents == 0:
        raise DataError(f"{name}: {_nothing(dataset, form, part)}")
    return replace(dataset, name=name)


def _check_form(sources: Sequence[Source], form: Form, part: Part | None) -> None:
    """Raise DataError where the options ask of the files what they do not have."""
    for source in sources:
        if part is not None and not source.has_rows:
            raise DataError(
                f"{source.path}: is one text, and data.val_fraction splits rows: set it to none, "
                "and name validation text with data.val_path"
            )
        if source.kind == "text" and form.train_on not in (None, "all"):
            raise DataError(
                f"{source.path}: holds text, in which nobody speaks: set data.train_on to all, got "
                f"{form.train_on}"
            )
        if form.pairs and source.kind != "preference":
            raise DataError(f'{source.path}: its rows must have "chosen" and "rejected"')


def _nothing(dataset: TokenDataset, form: Form, part: Part | None) -> str:
    """Why there is no document."""
    if dataset.n_dropped:
        return (
            f"none of its {dataset.n_dropped} rows has a token that is trained, with data.train_on "
            f"= {form.train_on or 'assistant'}"
        )
    if part is not None:
        return part.leaves_nothing()
    return f"no text in it, {dataset.n_empty} empty rows or files"


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
    trained: str = ""  # of trained.bin; none where every token is trained
    n_dropped: _Count = 0

    def summed(self) -> str:
        rest = msgspec.json.encode(msgspec.structs.replace(self, sum=""))
        return hashlib.blake2b(rest, digest_size=32).hexdigest()


class _Encoded(NamedTuple):
    tokens: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]  # of documents, counted from the chunk's first token
    n_empty: int
    text_bytes: int
    read_bytes: int
    trained: npt.NDArray[np.uint8]
    n_dropped: int


class _Encoder:
    """Chunk -> tokens; built once in each process."""

    def __init__(self, files: Mapping[str, bytes], dtype: str, way: _Way = _PLAIN) -> None:
        self._tokenizer = from_files(files, "tokenizer")
        self._dtype, self._way = dtype, way
        self._encode = ConversationEncoder(self._tokenizer, way.form)

    def __call__(self, chunk: Chunk) -> _Encoded:
        if chunk.source.kind != "text":
            return self._conversations(chunk)
        tokenizer, has_rows = self._tokenizer, chunk.source.has_rows
        special = has_rows and tokenizer.has_markup and not self._way.as_text
        part = self._way.part
        ids: list[int] = []
        starts: list[int] = []
        n_empty = text_bytes = 0
        for text in self._texts(chunk):
            begins, ends = has_rows or chunk.start == 0, has_rows or chunk.is_last
            if begins and ends and not text:
                n_empty += 1
                continue
            if part is not None and not part.holds(text.encode()):
                continue
            if begins:
                starts.append(len(ids))
                ids += tokenizer.begin
            ids += tokenizer.encode(text, continued=not begins, special=special)
            ids += [tokenizer.eos_id] * ends
            text_bytes += len(text.encode())
        return self._encoded(chunk, ids, [1] * len(ids), starts, n_empty, text_bytes, 0)

    def _conversations(self, chunk: Chunk) -> _Encoded:
        """Those with a trained token, as documents."""
        ids: list[int] = []
        trained: list[int] = []
        starts: list[int] = []
        text_bytes = n_dropped = 0
        for encoded in chain.from_iterable(read_rows(chunk, self._of_row)):
            mask = [0, *map(int, encoded.trained[1:])]  # no token comes before the first
            if not any(mask):
                n_dropped += 1
                continue
            starts.append(len(ids))
            ids += encoded.ids
            trained += mask
            said = compress(encoded.ids, mask)
            text_bytes += len(self._tokenizer.decode(said).encode())
        return self._encoded(chunk, ids, trained, starts, 0, text_bytes, n_dropped)

    def _of_row(self, conversations: list[Conversation]) -> list[Encoded]:
        """The tokens of a row: none where another part has it."""
        part, pairs = self._way.part, self._way.form.pairs
        if part is not None and not part.holds(conversations[0].digest_bytes):
            return []
        return [self._encode(each) for each in conversations[: None if pairs else 1]]

    def _encoded(
        self,
        chunk: Chunk,
        ids: list[int],
        trained: list[int],
        starts: list[int],
        n_empty: int,
        text_bytes: int,
        n_dropped: int,
    ) -> _Encoded:
        return _Encoded(
            np.array(ids, self._dtype),
            np.array(starts, np.int64),
            n_empty,
            text_bytes,
            chunk.end - chunk.start,
            np.array(trained, np.uint8),
            n_dropped,
        )

    def _texts(self, chunk: Chunk) -> list[str]:
        """The texts of a chunk; a part of a document ends where the tokenizer can be cut."""
        joint = self._tokenizer.joint
        is_whole = chunk.start == 0 and chunk.is_last
        if chunk.source.has_rows or is_whole or joint is None:
            return read_chunk(chunk)
        return [read_joined(chunk, joint)]


def _make_key(
    digests: Sequence[str], sources: Sequence[Source], tokenizer: Tokenizer, way: _Way = _PLAIN
) -> str:
    """A digest of all that decides the tokens; not of names and dates, so that files can move."""
    # True and False as in earlier versions, so that their tokens are still used.
    read_as = {"text": False, "jsonl": True}
    files = [
        (read_as.get(source.format, source.format), digest)
        for source, digest in zip(sources, digests, strict=True)
    ]
    made_of: list[object] = [tokenizer.ids_version, tokenizer.fingerprint, files]
    made_of += ["special tokens are text"] * (way.as_text and any(s.has_rows for s in sources))
    if any(source.kind != "text" for source in sources):
        form = way.form
        made_of += [_FORM_VERSION, [s.kind for s in sources], form.template, form.train_on]
        made_of += [form.pairs, tokenizer.chat_template, *NAMED.values()]
    if way.part is not None:
        made_of += [way.part.fraction, way.part.rest]
    return hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:32]


def _build(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    way: _Way,
    workers: int,
    progress: bool,
) -> None:
    """Tokenize the sources into `folder`, which appears only when it is whole."""
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = _Meta(dtype, 0, 0, 0, 0, tokenizer.bos_id, tokenizer.eos_id, "", "")
    make = partial(_Encoder, tokenizer.sources, dtype, way)
    with (
        atomic_directory(folder) as made,
        unpacked(sources, folder.parent) as ready,
        bytes_bar(ready, "Tokenizing", progress) as bar,
    ):
        chunks = (chunk for source in ready for chunk in cut(source))
        with (
            open(made / _TOKENS_FILE, "wb") as file,
            open(made / _DOCUMENTS_FILE, "wb") as documents,
            open(made / _TRAINED_FILE, "wb") as trained,
        ):
            for part in ordered_map(make, chunks, workers):
                file.write(part.tokens.data)
                documents.write((part.starts + meta.n_tokens).data)
                trained.write(part.trained.data)
                meta.n_tokens += len(part.tokens)
                meta.n_documents += len(part.starts)
                meta.n_empty += part.n_empty
                meta.text_bytes += part.text_bytes
                meta.n_dropped += part.n_dropped
                bar.update(part.read_bytes)
        for source in sources:
            source.check_unchanged()
        meta.digest = pieces_digest(made / _TOKENS_FILE)
        meta.documents = pieces_digest(made / _DOCUMENTS_FILE)
        if all(source.kind == "text" for source in sources):
            (made / _TRAINED_FILE).unlink()
        else:
            meta.trained = pieces_digest(made / _TRAINED_FILE)
        meta.sum = meta.summed()
        (made / _META_FILE).write_bytes(msgspec.json.encode(meta))


def _opened(folder: Path, tokenizer: Tokenizer) -> TokenDataset | None:
    """The dataset in `folder`; None if there is none, or a damaged one, which is removed."""
    return opened(folder, lambda place: _open(place, tokenizer), "the text is tokenized again")


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
        trained=_trained(folder / _TRAINED_FILE, meta) if meta.trained else None,
        n_dropped=meta.n_dropped,
    )


def _trained(path: Path, meta: _Meta) -> npt.NDArray[np.uint8]:
    """Which tokens are trained. Raises DataError."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != meta.n_tokens:
        raise DataError(f"{path}: damaged, missing or a link")
    if checked.digest("trained", [path], partial(pieces_digest, path)) != meta.trained:
        raise DataError(f"{path}: damaged: its sum does not hold")
    return _mapped(path, "uint8", meta.n_tokens)


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
