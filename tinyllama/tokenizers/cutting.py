"""Long texts in parts, cut where that changes no id.

The libraries slow down on long texts, or take a hundred bytes per character. Where a text may be
cut depends on the vocabulary and on what is done to a text before it: a tokenizer proposes joints,
and takes the first at which cut texts have the ids of whole ones.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

LONGEST_CHARS = 1 << 20  # a part without a joint is cut there, between two characters
LINE_END = re.compile("\n")

Encode = Callable[[str], list[int]]


def cut(text: str, chars: int, joint: re.Pattern[str] = LINE_END) -> Iterator[str]:
    """`text` in parts of about `chars`, cut behind matches of `joint`, or anywhere past
    LONGEST_CHARS."""
    start = 0
    while len(text) - start > chars:
        limit = start + LONGEST_CHARS
        match = joint.search(text, start + chars - 1, limit)
        if match is None and limit >= len(text):
            break
        end = limit if match is None else match.end()
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def holds(joint: re.Pattern[str], texts: Iterable[str], first: Encode, follows: Encode) -> bool:
    """Whether texts have the ids of the whole wherever they are cut at this joint. `follows`
    encodes a text that comes after another."""
    return all(_same(joint, text, first, follows) for text in texts)


def _same(joint: re.Pattern[str], text: str, first: Encode, follows: Encode) -> bool:
    whole = first(text)
    cuts = [match.end() for match in joint.finditer(text)]
    return all(first(text[:at]) + follows(text[at:]) == whole for at in cuts)


def crosses(joint: re.Pattern[str], pieces: Sequence[str]) -> bool:
    """Whether a piece of the vocabulary has the joint inside, so that it may lie across a cut."""
    return any(0 < match.end() < len(piece) for piece in pieces for match in joint.finditer(piece))
