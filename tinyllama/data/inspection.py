"""Rows of data as a model will see them: their ids, which are trained, what is cut off."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from tinyllama.data.conversations import Conversation, Encoder, Form
from tinyllama.data.files import Source, cut, find_sources, read_chunk, read_rows, unpacked
from tinyllama.tokenizers.tokenizer import Tokenizer


class InspectedRow(NamedTuple):
    """A row of a file, from 1: the ids that the model sees, and for each 1 where it is trained.
    `truncated`: its end is cut off, at the context length."""

    file: str
    row: int
    ids: list[int]
    trained: list[int]
    truncated: bool


class Run(NamedTuple):
    """Tokens side by side that are alike, and their text."""

    text: str
    trained: bool
    special: bool


@dataclass
class Totals:
    """What is counted over all rows."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0  # conversations whose end is cut off
    dropped: int = 0  # rows without a token that is trained
    lengths: Counter[int] = field(default_factory=Counter)  # of rows, in tokens

    def add(self, row: InspectedRow) -> None:
        """Count a row."""
        self.rows += 1
        self.tokens += len(row.ids)
        self.trained += sum(row.trained)
        self.truncated += row.truncated
        self.dropped += not any(row.trained[1:])
        self.lengths[len(row.ids)] += 1

    def histogram(self, bars: int = 12) -> list[tuple[int, int, int]]:
        """(shortest, longest, rows) of equal ranges of lengths."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // bars))
        counts = Counter[int]()
        for length, rows in self.lengths.items():
            counts[(length - low) // width] += rows
        return [
            (low + bar * width, min(low + (bar + 1) * width - 1, high), counts[bar])
            for bar in range(-(-(high - low + 1) // width))
        ]


def inspect(
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    form: Form,
    context_length: int | None,
    special_tokens: bool = True,
) -> Iterator[InspectedRow]:
    """Every row of the files, in order. Of a preference the chosen answer.

    Raises DataError for bad rows, with the place.
    """
    with unpacked(find_sources(patterns)) as sources:
        for source in sources:
            if source.kind == "text":
                encoded = _texts(source, tokenizer, special_tokens)
            else:
                encoded = _conversations(source, Encoder(tokenizer, form))
            most = None if source.kind == "text" else context_length
            for number, (ids, trained) in enumerate(encoded, start=1):
                is_cut = most is not None and len(ids) > most
                yield InspectedRow(str(source.path), number, ids[:most], trained[:most], is_cut)


def _conversations(source: Source, encoder: Encoder) -> Iterator[tuple[list[int], list[int]]]:
    def encode(conversations: list[Conversation]) -> tuple[list[int], list[int]]:
        encoded = encoder(conversations[0])
        return encoded.ids, [*map(int, encoded.trained)]

    for chunk in cut(source):
        yield from read_rows(chunk, encode)


def _texts(
    source: Source, tokenizer: Tokenizer, special_tokens: bool
) -> Iterator[tuple[list[int], list[int]]]:
    special = source.has_rows and tokenizer.has_markup and special_tokens
    chunks = (read_chunk(chunk) for chunk in cut(source))
    texts = (text for chunk in chunks for text in chunk)
    for text in texts if source.has_rows else ["".join(texts)]:
        ids = [*tokenizer.begin, *tokenizer.encode(text, special=special), tokenizer.eos_id]
        yield ids, [1] * len(ids)


def runs(row: InspectedRow, tokenizer: Tokenizer) -> Iterator[Run]:
    """The text of a row, by what is trained and what are special tokens."""
    special = {*tokenizer.special_tokens.values(), *tokenizer.begin, *tokenizer.eos_ids}
    tokens = zip(row.ids, row.trained, strict=True)
    for (trained, number), group in groupby(
        tokens, key=lambda token: (bool(token[1]), token[0] if token[0] in special else -1)
    ):
        ids = [token for token, _ in group]
        yield Run(_text(ids, tokenizer), trained, number >= 0)


def _text(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    stream = tokenizer.stream(continued=True, special=True)
    return "".join([stream.push(token) for token in ids]) + stream.flush()
