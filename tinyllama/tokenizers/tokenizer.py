"""What a tokenizer is: text to ids and back, and the files that it consists of.

    Tokenizer        what the rest of the package knows of one, whatever library computes it
    StreamDecoder    ids in, text out, as soon as a character is whole
    SpecialToken     a token with a meaning of its own, such as the end of a turn

opening.py makes one from a file or a folder; sentencepiece.py and huggingface.py compute the ids.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tinyllama.errors import TokenizerError
from tinyllama.system.files import atomic_write

# The codec marks an invalid byte by a lone surrogate; like SentencePiece we show it as U+FFFD.
_REPLACE_INVALID = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")

Span = tuple[int, int]


@dataclass(frozen=True)
class SpecialToken:
    """A token beside the pieces of text. The fields are those of tokenizer_config.json.

    One that is `special` is found in a text only where the caller says so; others (runs of spaces,
    for one) are found in every text. `lstrip` and `rstrip` take the whitespace before and behind
    with them; a `single_word` has no letter or digit beside it.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds neither begin nor end: `begin` and `end` are the ids
    around a document."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""

    @property
    def pieces(self) -> Sequence[str]:
        """What each id is called in the vocabulary; "" where an id has no piece."""

    @property
    def bos_id(self) -> int | None:
        """The id for the begin of a text, if there is one."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document: the first of eos_ids."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id at which generation stops: the end of a text, of a turn."""

    @property
    def begin(self) -> tuple[int, ...]:
        """The ids before a document or a prompt: (bos_id,), or none if this tokenizer adds none."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The special tokens, by their text."""

    @property
    def has_markup(self) -> bool:
        """Whether texts may hold special tokens of a meaning: there is a chat template, or a
        special token other than begin, end, unknown and padding."""

    @property
    def chat_template(self) -> str | None:
        """The text of the Jinja template, if the tokenizer's files hold one."""

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides the ids of a text and of its begin and end."""

    @property
    def ids_version(self) -> int:
        """Counts the times that the ids of a text changed with the same fingerprint."""

    @property
    def vocabulary_digest(self) -> str:
        """Hex SHA-256 of the pieces in the order of their ids: what embeddings belong to."""

    @property
    def older_digests(self) -> tuple[str, ...]:
        """Such digests as earlier versions gave for the same files."""

    @property
    def sources(self) -> Mapping[str, bytes]:
        """The files that it was made from, by name: opening.from_files makes the same from them."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that travel with a model, by name: the sources, byte for byte, and those that
        transformers needs besides."""

    @property
    def joint(self) -> re.Pattern[str] | None:
        """Behind a match a text may be cut and go on as a `continued` one, with the ids of the
        whole; None for behind every line end."""

    def encode(self, text: str, *, continued: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, without begin and end.

        continued: other text comes before this one, so no space is put before the first word.
        special: special tokens written in the text are these tokens (a prompt, the output of a
        template); by default they are text like any other.
        Raises TokenizerError for a text that UTF-8 cannot hold (half of a surrogate pair).
        """

    def encode_with_spans(self, text: str, inert: str = "") -> tuple[list[int], list[Span]]:
        """The ids of a text with special tokens, and (begin, end) of each in it, in characters.

        inert: a character that keeps the special token around it from being read as one; it is
        removed, and is not counted.
        """

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 give U+FFFD each, special tokens no text, or
        their own with `special`. Raises TokenizerError for an unknown id."""

    def stream(self, *, continued: bool = False, special: bool = False) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time. `continued`: they follow other text, so a
        space before the first word is kept."""


class StreamDecoder:
    """Ids in, text out, as soon as a character is whole.

    What `push` and the final `flush` return, joined, is `Tokenizer.decode` of the ids.
    """

    def __init__(self, surfaces: Sequence[str | bytes], *, strip: bool) -> None:
        """surfaces: what each id stands for: text, or bytes (of a character's UTF-8). `strip` drops
        one space before the first text."""
        self._surfaces = surfaces
        self._strip = strip
        self._bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, piece: int) -> str:
        """Text that `piece` completes, perhaps none. Raises TokenizerError for an unknown id."""
        if not 0 <= piece < len(self._surfaces):
            raise TokenizerError(f"token id {piece}: must be 0 to {len(self._surfaces) - 1}")
        surface = self._surfaces[piece]
        if isinstance(surface, bytes):
            self._strip = False
            return self._bytes.decode(surface).translate(_REPLACE_INVALID)
        if surface and self._strip:
            surface = surface.removeprefix(" ")
            self._strip = False
        return self.flush() + surface

    def flush(self) -> str:
        """Bytes held back of a character that never became whole, as U+FFFD each."""
        return self._bytes.decode(b"", final=True).translate(_REPLACE_INVALID)


def check_encodable(text: str) -> None:
    """Raise TokenizerError for a text that UTF-8 cannot hold, with the place."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise TokenizerError(f"the text holds {place}, which UTF-8 cannot encode") from None


def write_files(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the tokenizer's files into `folder`, which is made if it does not exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        atomic_write(folder / name, data)
