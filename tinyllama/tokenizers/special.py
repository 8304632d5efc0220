"""Special and added tokens: which ids they may have, and where they stand in a text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.tokenizer import SpecialToken

# Ids between the pieces and an added token that may have no token: LLaMA 3 reserves 256.
MAX_GAP = 1 << 16


def check(
    added: Mapping[int, SpecialToken], n_pieces: int, source: str
) -> Mapping[int, SpecialToken]:
    """The added tokens. Raises TokenizerError for an id far beyond the pieces, and for a text with
    two ids beyond them."""
    numbers: dict[str, int] = {}
    for number, token in added.items():
        if number >= n_pieces + len(added) + MAX_GAP:
            raise TokenizerError(
                f"{source}: the added token {token.content!r} has id {number}, and there are"
                f" {n_pieces} pieces: its file belongs to another tokenizer or is damaged"
            )
        other = numbers.setdefault(token.content, number)
        if other != number and number >= n_pieces:
            raise TokenizerError(
                f"{source}: the added token {token.content!r} has the ids {other} and {number}: the"
                " tokenizer's files contradict each other"
            )
    return added


def extended(pieces: Sequence[str], added: Mapping[int, SpecialToken]) -> list[str]:
    """The pieces with the added tokens in their places; ids without a token have an empty piece."""
    size = max([len(pieces), *(number + 1 for number in added)])
    every = [*pieces, *[""] * (size - len(pieces))]
    for number, token in added.items():
        every[number] = token.content
    return every


def within(ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids that exist, each once, in their order."""
    return tuple(dict.fromkeys(number for number in ids if 0 <= number < vocab_size))


class Finder:
    """Finds tokens in a text: the leftmost, of several that begin there the longest."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        longest_first = sorted(tokens, key=lambda token: -len(token.content))
        self._ids = {token.content: token.id for token in longest_first}
        # A group per token would be slow: the text found names it, without the spaces around it.
        self._pattern = re.compile("|".join(map(_expression, longest_first)))

    def places(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(begin, end, token) for each token in the text, with the spaces that it takes."""
        for match in self._pattern.finditer(text) if self._ids else ():
            found = match[0] if match[0] in self._ids else match[0].strip()
            yield match.start(), match.end(), self._ids[found]

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text, the token behind it) in their order; the last one has no token."""
        start = 0
        for begin, end, token in self.places(text):
            yield text[start:begin], token
            start = end
        yield text[start:], None


def _expression(token: SpecialToken) -> str:
    left, right = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    before, behind = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{left}{re.escape(token.content)}{right}{behind}"
