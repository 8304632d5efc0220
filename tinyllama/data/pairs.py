"""Pairs of answers: JSON rows of a prompt, a chosen and a rejected answer -> padded batches.

    {"prompt": "...", "chosen": "...", "rejected": "..."}

Without "prompt" it is what both answers begin with. A row is tokenized as (BOS, prompt, answer,
EOS); the answer's tokens and the EOS are trained. Each pair fills two rows of a batch, the chosen
answer first, padded to the context and cut where they are longer. A pair of equal answers, and one
whose prompt fills the context, says nothing: it is left out and counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.data import json_array
from tinyllama.data.detect import BOM
from tinyllama.data.files import Source, content_digests, cut, find_sources, progress_bar
from tinyllama.data.kept import Kind, Writer, kept, key_of
from tinyllama.data.layout import Batch, Int32
from tinyllama.errors import DataError, TokenizerError
from tinyllama.system.json_files import short
from tinyllama.tokenizers.tokenizer import Tokenizer

_BLOCK = 1 << 20  # pairs whose places are checked at once


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


class _Row(msgspec.Struct):
    chosen: str
    rejected: str
    prompt: str | None = None


_DECODER = msgspec.json.Decoder(_Row)


@dataclass(frozen=True, eq=False)
class PairDataset:
    """Tokenized pairs on disk, memory-mapped. `places` are (pairs, 4): where the prompt begins in
    `tokens`, and the lengths of prompt, chosen and rejected answer, which follow one another."""

    path: Path  # the folder; its name is a digest of the rows and the tokenizer
    tokens: npt.NDArray[np.uint32]
    places: npt.NDArray[np.int64]
    n_same: int  # rows whose answers are equal, left out
    eos_id: int
    name: str  # the patterns it was made from, for errors
    usable: npt.NDArray[np.int64]  # numbers of the pairs whose prompt leaves room for an answer
    context_length: int

    @property
    def n_rows(self) -> int:
        """Pairs that are trained, each of which fills two rows of a batch."""
        return len(self.usable)

    @property
    def n_truncated(self) -> int:
        """Usable pairs of which an answer is cut."""
        lengths = self.places[self.usable, 1:]
        longest = lengths[:, 0] + lengths[:, 1:].max(1)
        return int((longest > self.context_length + 1).sum())

    def notices(self) -> list[str]:
        """What was left out or cut, a line for each."""
        long, cut_short = len(self.places) - len(self.usable), self.n_truncated
        lines = [
            (self.n_same, "left out: both answers are the same"),
            (long, f"left out: the prompt alone fills the context of {self.context_length} tokens"),
            (cut_short, f"cut to the context of {self.context_length} tokens"),
        ]
        return [f"{self.name}: {count} pairs {what}" for count, what in lines if count]

    def batch(self, numbers: npt.NDArray[np.int64], batch_size: int) -> Batch:
        """Rows of usable pairs by their numbers, filled up with rows without targets."""
        rows, first = self._rows(numbers, batch_size)
        return self._batch(rows, np.arange(1, rows.shape[1]) >= first[:, None])

    def odds_batch(self, numbers: npt.NDArray[np.int64], batch_size: int) -> OddsBatch:
        """The same for ORPO."""
        rows, first = self._rows(numbers, batch_size)
        is_there = rows[:, 1:] >= 0
        is_answer = is_there & (np.arange(1, rows.shape[1]) >= first[:, None])
        is_text = is_there & (np.arange(len(rows)) % 2 == 0)[:, None]
        answer = is_answer / np.maximum(is_answer.sum(1, keepdims=True), 1)
        text = is_text * (len(numbers) / max(int(is_text.sum()), 1))
        batch = self._batch(rows, is_answer | is_text)
        return OddsBatch(*batch, answer.astype(np.float32), text.astype(np.float32))

    def _rows(
        self, numbers: npt.NDArray[np.int64], batch_size: int
    ) -> tuple[Int32, npt.NDArray[np.int64]]:
        """Ids (2 B, T + 1), -1 where there is none, and where the answers begin (2 B,)."""
        T = self.context_length
        rows = np.full((2 * batch_size, T + 1), -1, np.int32)
        first = np.zeros(2 * batch_size, np.int64)
        for i, pair in enumerate(self.usable[numbers]):
            begin, prompt, chosen, rejected = self.places[pair].tolist()
            start = self.tokens[begin : begin + prompt, 0]
            answers = self.tokens[begin + prompt : begin + prompt + chosen + rejected, 0]
            for row, answer in ((2 * i, answers[:chosen]), (2 * i + 1, answers[chosen:])):
                ids = np.concatenate([start, answer])[: T + 1]
                rows[row, : len(ids)] = ids
                first[row] = prompt
        return rows, first

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
    special_tokens: bool = True,
    progress: bool = True,
) -> PairDataset:
    """The pairs in the files that `patterns` name, as tokens in a folder of `cache_dir`.

    Raises DataError for rows that are no pairs, with file and line, and where no pair is left.
    """
    sources = find_sources(patterns)
    name = patterns if isinstance(patterns, str) else ", ".join(patterns)
    special = special_tokens and tokenizer.has_markup
    cache = Path(cache_dir)
    files = [[s.format, d] for s, d in zip(sources, content_digests(sources, cache), strict=True)]
    key = key_of("pairs", tokenizer.ids_version, tokenizer.fingerprint, files, special)
    kinds = {"tokens": Kind("uint32", 1, tokenizer.vocab_size), "places": Kind("int64", 4)}

    def make(write: Writer) -> dict[str, int]:
        return _tokenize(sources, _Encoder(tokenizer, special), write, progress)

    found = kept(cache, key, kinds, make)
    tokens, places = found.arrays["tokens"], found.arrays["places"]
    _check_places(found.folder, places, len(tokens))
    usable = np.flatnonzero(places[:, 1] <= context_length) if len(places) else np.zeros(0, int)
    dataset = PairDataset(
        found.folder, tokens, places, found.notes.get("same", 0),
        tokenizer.eos_id, name, usable, context_length,
    )  # fmt: skip
    if not len(usable):
        why = "; ".join(dataset.notices()) or f"{name}: it holds no rows"
        raise DataError(f"{name}: no pair to train on: {why}")
    return replace(dataset, name=name)


class _Encoder:
    """A pair -> its prompt's and answers' ids."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special

    def __call__(self, row: _Row) -> tuple[list[int], list[int], list[int]]:
        prompt, chosen, rejected = _with_prompt(row)
        ids = self._ids(prompt, continued=False)
        answers = (self._ids(text, continued=bool(prompt)) for text in (chosen, rejected))
        ends = [self._tokenizer.eos_id]
        first, second = ([*answer, *ends] for answer in answers)
        return [*self._tokenizer.begin, *ids], first, second

    def _ids(self, text: str, *, continued: bool) -> list[int]:
        return self._tokenizer.encode(text, continued=continued, special=self._special)


def _with_prompt(row: _Row) -> tuple[str, str, str]:
    """Prompt and answers; a prompt that is not given is what both begin with, up to a space."""
    if row.prompt is not None:
        return row.prompt, row.chosen, row.rejected
    pairs = zip(row.chosen, row.rejected, strict=False)
    shortest = min(len(row.chosen), len(row.rejected))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
    if same and row.chosen[same - 1] == " ":
        same -= 1
    return row.chosen[:same], row.chosen[same:], row.rejected[same:]


def _tokenize(
    sources: Sequence[Source], encode: _Encoder, write: Writer, progress: bool
) -> dict[str, int]:
    at = same = 0
    with progress_bar(sources, "Tokenizing", progress) as bar:
        for source in sources:
            for place, data in _rows(source):
                try:
                    row = _parsed(data)
                    parts = encode(row)
                except (DataError, TokenizerError) as error:
                    raise DataError(f"{place}: {error}") from None
                bar.update(len(data))
                if parts[1] == parts[2]:
                    same += 1
                    continue
                write("places", np.array([at, *map(len, parts)]))
                write("tokens", np.array([i for part in parts for i in part], np.uint32))
                at += sum(map(len, parts))
    for source in sources:
        source.check_unchanged()
    return {"same": same}


def _rows(source: Source) -> Iterator[tuple[str, bytes]]:
    """Each row of a file with its place, for errors."""
    if source.format not in ("jsonl", "json"):
        raise DataError(
            f"{source.path}: pairs are read from JSON Lines or a JSON array of rows"
            ' {"prompt": ..., "chosen": ..., "rejected": ...}'
        )
    line = row_number = 1
    for chunk in cut(source):
        with open(source.path, "rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.end - chunk.start)
        if source.format == "json":
            for _, row in json_array.rows(data, is_first=chunk.start == 0):
                yield f"{source.path}, row {row_number}", row
                row_number += 1
            continue
        data = data.removeprefix(BOM) if chunk.start == 0 else data
        for text in data.removesuffix(b"\n").split(b"\n"):
            if text.strip():
                yield f"{source.path}, line {line}", text
            line += 1


def _parsed(data: bytes) -> _Row:
    """The row. Raises DataError, whose message has no place yet."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        try:
            keys: Any = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError):
            raise DataError(f"not valid JSON: {error}") from None
        found = ", ".join(short(repr(key), 40) for key in list(keys)[:8]) if keys else "none"
        if not isinstance(keys, dict):
            found = f"none, but {type(keys).__name__}"
        raise DataError(
            'must be a pair of texts, {"prompt": ..., "chosen": ..., "rejected": ...}:'
            f" {error}; keys found: {found}"
        ) from None


def _check_places(folder: Path, places: npt.NDArray[np.int64], n_tokens: int) -> None:
    """A sum proves no origin: raise DataError for places that are not within the tokens."""
    for first in range(0, len(places), _BLOCK):
        block = places[first : first + _BLOCK]
        inside = (block >= 0).all() and (block <= n_tokens).all()
        if not inside or (block.sum(1) > n_tokens).any():
            raise DataError(f"{folder}: damaged: pairs that are not within the tokens")
