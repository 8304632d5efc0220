"""Pairs of answers: rows with a chosen and a rejected one -> padded batches.

    {"prompt": "...", "chosen": "...", "rejected": "..."}      texts, or lists of messages

conversations.py says what rows may hold, and which tokens a template's answers are; the prompt is
never trained. Each pair fills two rows of a batch, the chosen one first, padded to the context and
cut where they are longer. A pair of equal answers, and one whose prompt fills the context, says
nothing: it is left out and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.data.conversations import OWN, Conversation, Encoder, Form
from tinyllama.data.corpus import Part
from tinyllama.data.files import (
    Source,
    bytes_bar,
    content_digests,
    cut,
    find_sources,
    read_rows,
    unpacked,
)
from tinyllama.data.kept import Kind, Writer, kept, key_of
from tinyllama.data.layout import Batch, Int32
from tinyllama.data.spool import Spool
from tinyllama.errors import DataError
from tinyllama.tokenizers.templates import NAMED, Encoded
from tinyllama.tokenizers.tokenizer import Tokenizer

_BLOCK = 1 << 17  # pairs whose places are checked at once


class OddsBatch(NamedTuple):
    """Pairs for ORPO, see train/preferences.py. In chosen rows the prompt has targets too."""

    tokens: Int32  # (2 B, T)
    targets: Int32  # (2 B, T)
    starts: Int32  # (2 B, T)
    answer: npt.NDArray[np.float32]  # (2 B, T): 1 / length of the answer, at its targets
    text: npt.NDArray[np.float32]  # (2 B, T): pairs / tokens of the batch, in chosen rows


class ReferencedBatch(NamedTuple):
    """Pairs for DPO, with the log-probability of each row under the reference."""

    tokens: Int32  # (2 B, T)
    targets: Int32  # (2 B, T)
    starts: Int32  # (2 B, T)
    reference: npt.NDArray[np.float32]  # (2 B,), in nats


@dataclass(frozen=True, eq=False)
class PairDataset:
    """Tokenized pairs on disk, memory-mapped. `places` are (pairs, 5): where the chosen one begins
    in `tokens`, its length and that of the rejected one behind it, and the number of the first
    trained token in each."""

    path: Path  # the folder; its name is a digest of the rows and the tokenizer
    tokens: npt.NDArray[np.uint32]  # (tokens, 1)
    trained: npt.NDArray[np.uint8]  # (tokens, 1): whether the token is part of an answer
    places: npt.NDArray[np.int64]
    n_same: int  # rows whose answers are equal, left out
    eos_id: int
    name: str  # the patterns it was made from, for errors
    usable: npt.NDArray[np.int64]  # numbers of the pairs whose prompt leaves room for an answer
    n_truncated: int  # usable pairs of which an answer is cut
    context_length: int

    @property
    def n_rows(self) -> int:
        """Pairs that are trained, each of which fills two rows of a batch."""
        return len(self.usable)

    def notices(self) -> list[str]:
        """What was left out or cut, a line for each."""
        long, cut_short = len(self.places) - len(self.usable), self.n_truncated
        lines = [
            (self.n_same, "left out: both answers are the same, or one is empty"),
            (long, f"left out: the prompt alone fills the context of {self.context_length} tokens"),
            (cut_short, f"cut to the context of {self.context_length} tokens"),
        ]
        return [f"{self.name}: {count} pairs {what}" for count, what in lines if count]

    def batch(self, numbers: npt.NDArray[np.int64], batch_size: int) -> Batch:
        """Rows of usable pairs by their numbers, filled up with rows without targets."""
        rows, is_answer = self._rows(numbers, batch_size)
        return self._batch(rows, is_answer)

    def documents(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The numbers, among all pairs, of usable pairs; sorted."""
        return np.unique(self.usable[numbers])

    def odds_batch(self, numbers: npt.NDArray[np.int64], batch_size: int) -> OddsBatch:
        """The same for ORPO."""
        rows, is_answer = self._rows(numbers, batch_size)
        is_text = (rows[:, 1:] >= 0) & (np.arange(len(rows)) % 2 == 0)[:, None]
        answer = is_answer / np.maximum(is_answer.sum(1, keepdims=True), 1)
        text = is_text * (len(numbers) / max(int(is_text.sum()), 1))
        batch = self._batch(rows, is_answer | is_text)
        return OddsBatch(*batch, answer.astype(np.float32), text.astype(np.float32))

    def _rows(
        self, numbers: npt.NDArray[np.int64], batch_size: int
    ) -> tuple[Int32, npt.NDArray[np.bool_]]:
        """Ids (2 B, T + 1), -1 where there is none, and whether each but the first is part of an
        answer (2 B, T)."""
        T = self.context_length
        rows = np.full((2 * batch_size, T + 1), -1, np.int32)
        is_answer = np.zeros((2 * batch_size, T + 1), bool)
        for i, pair in enumerate(self.usable[numbers]):
            begin, chosen, rejected = self.places[pair, :3].tolist()
            for row, at, length in ((2 * i, begin, chosen), (2 * i + 1, begin + chosen, rejected)):
                end = at + min(length, T + 1)
                rows[row, : end - at] = self.tokens[at:end, 0]
                is_answer[row, : end - at] = self.trained[at:end, 0]
        return rows, is_answer[:, 1:]

    def _batch(self, rows: Int32, is_trained: npt.NDArray[np.bool_]) -> Batch:
        """Rows of ids whose targets are those that are trained; padding attends to itself."""
        tokens = rows[:, :-1].copy()
        targets = np.where(is_trained, rows[:, 1:], -1).astype(np.int32)
        is_padding = tokens < 0
        positions = np.arange(tokens.shape[1], dtype=np.int32)
        starts = np.where(is_padding, positions, 0).astype(np.int32)
        tokens[is_padding] = self.eos_id
        return Batch(tokens, targets, starts)


def prepare_pairs(
    patterns: str | Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    context_length: int,
    *,
    form: Form = OWN,
    part: Part | None = None,
    progress: bool = True,
) -> PairDataset:
    """The pairs in the files that `patterns` name, as tokens in a folder of `cache_dir`. `form`
    says how conversations become text; `part` takes some of the rows, by their chosen answers, as
    supervised training on the same file does.

    Raises DataError for rows that are no pairs, with file and line, and where no pair is left.
    """
    sources = find_sources(patterns)
    name = patterns if isinstance(patterns, str) else ", ".join(patterns)
    cache, form = Path(cache_dir), replace(form, pairs=True)
    files = [[s.format, d] for s, d in zip(sources, content_digests(sources, cache), strict=True)]
    way: list[object] = [form.template, form.train_on, tokenizer.chat_template, *NAMED.values()]
    way += [] if part is None else [part.fraction, part.rest]
    key = key_of("pairs", tokenizer.ids_version, tokenizer.fingerprint, files, way)
    kinds = {"tokens": Kind("uint32", 1, tokenizer.vocab_size), "trained": Kind("uint8", 1, 2)}
    kinds["places"] = Kind("int64", 5)

    def make(write: Writer) -> dict[str, int]:
        return _tokenize(sources, Encoder(tokenizer, form), part, write, cache, progress)

    found = kept(cache, key, kinds, make)
    tokens, trained, places = (found.arrays[name] for name in kinds)
    _check_places(found.folder, places, min(len(tokens), len(trained)))
    usable, n_truncated = _usable(places, context_length, cache)
    dataset = PairDataset(
        found.folder, tokens, trained, places, found.notes.get("same", 0),
        tokenizer.eos_id, name, usable, n_truncated, context_length,
    )  # fmt: skip
    if not len(usable):
        none = f"{name}: it holds no rows" if part is None else part.leaves_nothing()
        why = "; ".join(dataset.notices()) or none
        raise DataError(f"{name}: no pair to train on: {why}")
    return dataset


def _tokenize(
    sources: Sequence[Source],
    encode: Encoder,
    part: Part | None,
    write: Writer,
    cache: Path,
    progress: bool,
) -> dict[str, int]:
    for source in sources:
        if source.kind != "preference":
            raise DataError(
                f'{source.path}: pairs have "chosen" and "rejected" in each row, and its first row'
                " has not"
            )

    def both(row: list[Conversation]) -> list[Encoded] | None:
        if part is not None and not part.holds(row[0].digest_bytes):
            return None
        return [encode(conversation) for conversation in row]

    at = same = 0
    with (
        unpacked(sources, cache) as ready,
        bytes_bar(ready, "Tokenizing", progress) as bar,
    ):
        for chunk in (chunk for source in ready for chunk in cut(source)):
            for pair in filter(None, read_rows(chunk, both)):
                first = [_first_trained(one) for one in pair]
                if pair[0].ids == pair[1].ids or min(first) < 0:
                    same += 1
                    continue
                lengths = [len(one.ids) for one in pair]
                write("places", np.array([at, *lengths, *first]))
                write("tokens", np.array([i for one in pair for i in one.ids], np.uint32))
                write("trained", np.array([t for one in pair for t in one.trained], np.uint8))
                at += sum(lengths)
            bar.update(chunk.end - chunk.start)
    for source in sources:
        source.check_unchanged()
    return {"same": same}


def _first_trained(one: Encoded) -> int:
    """The number of the first trained token that another comes before; -1 if there is none."""
    return next((i for i, trained in enumerate(one.trained) if trained and i), -1)


def _usable(
    places: npt.NDArray[np.int64], context_length: int, cache: Path
) -> tuple[npt.NDArray[np.int64], int]:
    """The pairs whose prompt leaves room for an answer, and of how many an answer is cut."""
    usable, n_truncated = Spool(cache, "int64"), 0
    for first in range(0, len(places), _BLOCK):
        block = places[first : first + _BLOCK]
        leaves_room = block[:, 3:].max(1) <= context_length
        is_long = block[:, 1:3].max(1) > context_length + 1
        usable.append(first + np.flatnonzero(leaves_room))
        n_truncated += int((leaves_room & is_long).sum())
    return usable.array(), n_truncated


def _check_places(folder: Path, places: npt.NDArray[np.int64], n_tokens: int) -> None:
    """A sum proves no origin: raise DataError for places that are not within the tokens."""
    for first in range(0, len(places), _BLOCK):
        block = places[first : first + _BLOCK]
        inside = (block >= 0).all() and (block <= n_tokens).all()
        if not inside or (block[:, :3].sum(1) > n_tokens).any():
            raise DataError(f"{folder}: damaged: pairs that are not within the tokens")
