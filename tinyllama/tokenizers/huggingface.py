"""Text to ids with a tokenizer.json, computed by Hugging Face's `tokenizers`.

The file describes everything: normalizer, pre-tokenizer, model (byte pairs or unigrams), the begin
that is put before a text. Two families are known by how they write a text into pieces:

    byte level      each byte is a printable character (GPT-2, LLaMA 3, SmolLM2, Qwen)
    spaces as U+2581, unknown characters as bytes <0x0A>, as SentencePiece (LLaMA 1 and 2, Mistral)

The library is imported when a tokenizer of this kind is opened.
"""

import copy
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec

from tinyllama.errors import TokenizerError
from tinyllama.system.untrusted import printable
from tinyllama.tokenizers import special
from tinyllama.tokenizers.cutting import LONGEST_CHARS, crosses, cut, holds
from tinyllama.tokenizers.files import CONFIG_FILE, JSON_FILE, decode_json, read_settings, to_json
from tinyllama.tokenizers.tokenizer import Span, SpecialToken, StreamDecoder, check_encodable

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
_CUT_CHARS = 1 << 16
_NO_TEXT = "\ufdd0\ufdd1\ufdd2"  # not characters: before a piece that no text shall give
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# Behind a word and before the space of the next; behind a line end between two words. Runs of
# spaces and of line ends are not cut: a pre-tokenizer may look ahead in them.
_JOINTS = (
    re.compile(r"\S(?= \S)|(?<=\S)\n(?=\S)"),
    re.compile(r"\S(?= \S)"),
    re.compile(r"(?<=\S)\n(?=\S)"),
)
_TRIED = (
    "the river, it's 12 345 stones (a.b) = {x}; I'll don't\nthe end.\nof a line\n\n  indented x\n",
    "def f(x):\n    return x + 1  # two  spaces\n\n\nclass A:\n\tpass\r\nnext\r\n",
    "Öl und Käse, naïve café\nΑλφα βήτα\nРека и камень 3,14\n漢字 かな 한국어 문장\nनमस्ते दुनिया\n",
    "emoji 👩‍👩‍👧 🇨🇭 !? ...\n«x» – “y” #tag @name http://a.b/c?d=e&f\nABCdef GHI jklMNO\n's 'll\n",
)


class JsonTokenizer:
    """A tokenizer.json and the files beside it; a Tokenizer.

    `source` names it in errors. Raises TokenizerError for a file that the library refuses, of an
    unknown family, or whose tokens contradict the other files.
    """

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        self.sources, self._source = files, source
        self.settings = read_settings(files, source)
        values = _read(files[JSON_FILE], source)
        vocabulary = _vocabulary(values, source)
        added = special.check(self.settings.added, len(vocabulary), source)
        named = _named(self.settings.special, vocabulary, added)
        self._added = {**named, **added}
        self._in_json = {token.get("id") for token in values.get("added_tokens") or []}
        values["added_tokens"] = [asdict(token) for _, token in sorted(self._added.items())]
        self._values, self._lock = values, threading.Lock()
        self._library = _build(values, source)
        self._libraries = {(False, True): (values, self._library)}  # by (continued, special)
        _check_ids(self._library, self._added.values(), source)
        self.pieces = special.extended(_by_id(vocabulary), self._added)
        self.vocab_size = len(self.pieces)
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in self._added.items() if token.special
        }
        self._set_ends(vocabulary, source)

    def _set_ends(self, vocabulary: Mapping[str, int], source: str) -> None:
        """Begin and end of a text, and what the post-processor puts before one."""
        numbers = {**vocabulary, **{token.content: n for n, token in self._added.items()}}
        roles, said = self.settings.roles, self.settings
        bos, eos = (numbers.get(roles.get(role, "")) for role in ("bos", "eos"))
        self.begin = self._begin(bos, source)
        first = self.begin[0] if self.begin else said.bos_id
        self.bos_id = first if bos is None else bos
        self.eos_ids = special.within([-1 if eos is None else eos, *said.eos_ids], self.vocab_size)
        if not self.eos_ids:
            raise TokenizerError(
                f"{source}: no file names the token that ends a text: {CONFIG_FILE} does by"
                " eos_token, generation_config.json by eos_token_id"
            )
        self.eos_id = self.eos_ids[0]

    def _begin(self, bos: int | None, source: str) -> tuple[int, ...]:
        """The ids that the library puts before a text."""
        if self._values.get("post_processor") is None:
            return (bos,) if self.settings.adds_bos and bos is not None else ()
        with _refusing(source):
            plain = self._library.encode("a", add_special_tokens=False).ids
            whole = self._library.encode("a", add_special_tokens=True).ids
        places = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        at = next(places, None)
        if at is None:
            raise TokenizerError(f"{source}: post_processor: must put tokens around a text")
        return tuple(whole[:at])

    @property
    def chat_template(self) -> str | None:
        """The text of the Jinja template, if the files hold one."""
        return self.settings.chat_template

    @property
    def has_markup(self) -> bool:
        """Whether texts may hold special tokens besides begin, end, unknown and padding."""
        plain = {self.special_tokens.get(text) for text in self.settings.roles.values()}
        plain |= {self.bos_id, self.eos_id}
        others = set(self.special_tokens.values()) - plain
        return self.chat_template is not None or bool(others)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokenizer.json's and of what the other files say besides."""
        own = hashlib.sha256(self.sources[JSON_FILE]).hexdigest()
        besides = [astuple(t) for n, t in sorted(self._added.items()) if n not in self._in_json]
        made_of = [own, self.begin, self.eos_id, besides]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @property
    def ids_version(self) -> int:
        """Nothing has changed yet."""
        return 1

    @cached_property
    def vocabulary_digest(self) -> str:
        """Hex SHA-256 of the pieces in the order of their ids: what embeddings belong to."""
        return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

    @property
    def older_digests(self) -> tuple[str, ...]:
        """Earlier versions knew no such tokenizer."""
        return ()

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The files it was made from, and a tokenizer_config.json if there was none."""
        if CONFIG_FILE in self.sources:
            return self.sources
        named = {"bos": self.bos_id, "eos": self.eos_id}
        tokens = {f"{r}_token": self.pieces[n] for r, n in named.items() if n is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        return {**self.sources, CONFIG_FILE: to_json(config)}

    def encode(self, text: str, *, continued: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, without begin and end. `continued`: other text comes before this one, so
        no space is put before the first word. `special`: special tokens written in the text are
        these tokens. Raises TokenizerError for a text that UTF-8 cannot hold."""
        check_encodable(text)
        ids: list[int] = []
        for number, part in enumerate(self._parts(text, special)):
            ids += self._ids(part, continued or number > 0, special)
        return ids

    def encode_with_spans(self, text: str, inert: str = "") -> tuple[list[int], list[Span]]:
        """Ids of a text with special tokens, and (begin, end) of each, in characters; see
        Tokenizer."""
        check_encodable(text)
        ids, spans = self._located(text, False, True)
        if not inert or inert not in text:
            return ids, spans
        made: tuple[list[int], list[Span]] = [], []
        special, removed, before = set(self.special_tokens.values()), 0, 0
        for is_special, run in groupby(range(len(ids)), key=lambda number: ids[number] in special):
            numbers = [*run]
            first, last = numbers[0], numbers[-1] + 1
            following = spans[last][0] if last < len(ids) else len(text)
            end = spans[last - 1][1] if is_special else following
            own, part = ids[first:last], text[before:end]
            if inert in part and not is_special:
                continued = self._ids(part, False, True) != own
                clean = part.replace(inert, "")
                own, places = self._located(clean, continued, False)
                places = [(b + before - removed, e + before - removed) for b, e in places]
                removed += len(part) - len(clean)
            else:
                places = [(b - removed, e - removed) for b, e in spans[first:last]]
            made[0].extend(own)
            made[1].extend(places)
            before = end
        return made

    def _parts(self, text: str, special: bool) -> Iterable[str]:
        """A long text in parts that have the ids of the whole."""
        if len(text) <= _CUT_CHARS:
            return [text]
        joint = self.joint if not special or self._cuts_markup else None
        if joint is not None:
            return cut(text, _CUT_CHARS, joint)
        return [text] if special else cut(text, LONGEST_CHARS)

    def _ids(self, text: str, continued: bool, special: bool) -> list[int]:
        ids: list[int] = self._encoding(text, continued, special).ids
        return ids

    def _located(self, text: str, continued: bool, special: bool) -> tuple[list[int], list[Span]]:
        """Ids and their places in the text."""
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for number, part in enumerate(self._parts(text, special)):
            encoding = self._encoding(part, continued or number > 0, special)
            ids += encoding.ids
            spans += [(at + begin, at + end) for begin, end in encoding.offsets]
            at += len(part)
        return ids, spans

    def _encoding(self, text: str, continued: bool, special: bool) -> Any:
        library = self._library_for(continued, special)
        with self._lock, _refusing(self._source):  # the flag is the library's own state
            library.encode_special_tokens = not special
            return library.encode(text, add_special_tokens=False)

    def _library_for(self, continued: bool, special: bool) -> "tokenizers.Tokenizer":
        """Built when first used; the same object where nothing differs."""
        key = continued, special
        if key not in self._libraries:
            values = _without_space(self._values) if continued else self._values
            values = values if special else _without_special(values)
            same = (k for k, (made_of, _) in self._libraries.items() if made_of == values)
            found = next(same, None)
            library = _build(values, self._source) if found is None else self._libraries[found][1]
            self._libraries[key] = values, library
        return self._libraries[key][1]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens give none, or their own text with `special`; bytes that are
        not UTF-8 give U+FFFD each."""
        stream = self.stream(special=special)
        return "".join([stream.push(piece) for piece in ids]) + stream.flush()

    def stream(self, *, continued: bool = False, special: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one at a time. `continued`: they follow other text, so a
        space before the first word is kept."""
        surfaces = self._surfaces_with_special if special else self._surfaces
        adds_space = not self._is_byte_level and _without_space(self._values) != self._values
        return StreamDecoder(surfaces, strip=adds_space and not continued)

    @cached_property
    def joint(self) -> re.Pattern[str] | None:
        """Where this tokenizer's texts can be cut without changing the ids; None if nowhere."""
        pieces = [s if isinstance(s, str) else s.decode(errors="ignore") for s in self._surfaces]

        def first(text: str) -> list[int]:
            return self._ids(text, False, False)

        def follows(text: str) -> list[int]:
            return self._ids(text, True, False)

        for joint in _JOINTS:
            if not crosses(joint, pieces) and holds(joint, _TRIED, first, follows):
                return joint
        return None

    @cached_property
    def _cuts_markup(self) -> bool:
        """Whether a joint is never inside a special token or the spaces that one takes."""
        return not any(t.rstrip or re.search(r"\s", t.content) for t in self._added.values())

    @property
    def _is_byte_level(self) -> bool:
        parts = [*_parts(self._values.get("decoder")), *_parts(self._values.get("pre_tokenizer"))]
        return any(part.get("type") == "ByteLevel" for part in parts)

    @cached_property
    def _surfaces(self) -> Sequence[str | bytes]:
        """What each id stands for: text, or bytes (of a character's UTF-8); nothing for special
        tokens."""
        surfaces = [*self._surfaces_with_special]
        for number in self.special_tokens.values():
            surfaces[number] = ""
        return surfaces

    @cached_property
    def _surfaces_with_special(self) -> Sequence[str | bytes]:
        of_piece = _bytes_of if self._is_byte_level else _text_of
        surfaces = [of_piece(piece) for piece in self.pieces]
        for number, token in self._added.items():
            surfaces[number] = token.content.encode()
        return surfaces


# ---- the file


def _read(data: bytes, source: str) -> dict[str, Any]:
    values = decode_json(data, f"{source}: {JSON_FILE}")
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise TokenizerError(f"{source}: {JSON_FILE}: holds no model with a vocabulary")
    # Of training with rows of one length; ids must not depend on it.
    return {**values, "truncation": None, "padding": None}


def _vocabulary(values: Mapping[str, Any], source: str) -> dict[str, int]:
    """Piece -> id. Raises TokenizerError for a model of another kind than LLaMA's."""
    model = values["model"]
    vocab, kind = model["vocab"], model.get("type", "BPE")
    if kind == "BPE" and isinstance(vocab, dict):
        numbers = vocab
    elif kind == "Unigram" and isinstance(vocab, list):
        if not all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in vocab):
            raise TokenizerError(f"{source}: {JSON_FILE}: model.vocab: must be [piece, score] each")
        numbers = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        raise TokenizerError(
            f"{source}: {JSON_FILE}: a model of type {printable(repr(kind))}, must be 'BPE' or "
            "'Unigram' as those of LLaMA models"
        )
    end = len(numbers) + special.MAX_GAP
    if not all(type(number) is int and 0 <= number < end for number in numbers.values()):
        raise TokenizerError(
            f"{source}: {JSON_FILE}: damaged: the ids of pieces must be numbers, of"
            f" {len(numbers)} below {end}"
        )
    return numbers


def _by_id(vocabulary: Mapping[str, int]) -> list[str]:
    """The pieces in the order of their ids; where an id has none, it is empty."""
    pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, number in vocabulary.items():
        pieces[number] = piece
    return pieces


def _named(
    texts: Iterable[str], vocabulary: Mapping[str, int], added: Mapping[int, SpecialToken]
) -> dict[int, SpecialToken]:
    """Special tokens that other files name and that are only pieces of the vocabulary here."""
    found = ((vocabulary.get(text), text) for text in texts)
    return {n: SpecialToken(text, n) for n, text in found if n is not None and n not in added}


def _build(values: Mapping[str, Any], source: str) -> "tokenizers.Tokenizer":
    """The library's object. Raises TokenizerError with its reason."""
    import tokenizers

    with _refusing(source):
        return tokenizers.Tokenizer.from_buffer(msgspec.json.encode(values))


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """Raise TokenizerError, with its reason, for what the library says of a file: some of it as
    soon as the file is read, some only about a text."""
    try:
        yield
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = printable(" ".join(str(error).split()), 400)
        raise TokenizerError(f"{source}: {JSON_FILE}: cannot be used: {reason}") from None


def _check_ids(library: "tokenizers.Tokenizer", added: Iterable[SpecialToken], source: str) -> None:
    """Raise TokenizerError if the library gives an added token another id than its file."""
    for token in added:
        number = library.token_to_id(token.content)
        if number != token.id:
            raise TokenizerError(
                f"{source}: the added token {token.content!r} has id {token.id} in its file, and"
                f" {number} by its place in {JSON_FILE}: the files contradict each other"
            )


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or those of a sequence."""
    if isinstance(component, dict):
        inside = [component.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
        for part in (part for parts in inside if isinstance(parts, list) for part in parts):
            yield from _parts(part)
        yield component


def _is_prepend(component: Any) -> bool:
    """Whether it puts something before a text; the library also reads components of other kinds
    than objects."""
    return isinstance(component, dict) and component.get("type") == "Prepend"


def _without_space(values: Mapping[str, Any]) -> dict[str, Any]:
    """The file without what puts a space before a text."""
    values = {**values, "normalizer": copy.deepcopy(values.get("normalizer"))}
    values["pre_tokenizer"] = copy.deepcopy(values.get("pre_tokenizer"))
    normalizer = values["normalizer"]
    if _is_prepend(normalizer):
        values["normalizer"] = None
    for part in _parts(values["normalizer"]):
        if isinstance(part.get("normalizers"), list):
            part["normalizers"] = [p for p in part["normalizers"] if not _is_prepend(p)]
    for part in _parts(values["pre_tokenizer"]):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    return values


def _without_special(values: dict[str, Any]) -> dict[str, Any]:
    """The file without special tokens, where the model would take them for pieces of a text: the
    most probable pieces of a text that holds "<s>" would be that token."""
    if values["model"].get("type") != "Unigram":
        return values  # byte pairs never make one
    special = {token["content"] for token in values["added_tokens"] if token["special"]}
    vocab = [
        [_NO_TEXT + piece if piece in special else piece, score]
        for piece, score, *_ in values["model"]["vocab"]
    ]
    added = [token for token in values["added_tokens"] if not token["special"]]
    model = {**values["model"], "vocab": vocab}
    return {**values, "model": model, "added_tokens": added, "post_processor": None}


def _byte_characters() -> dict[str, int]:
    """Character -> byte, as GPT-2 writes bytes: those that print are themselves, the others follow
    from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_characters()


def _bytes_of(piece: str) -> str | bytes:
    """The bytes of a piece of a byte-level vocabulary."""
    try:
        return bytes([_BYTES[character] for character in piece])
    except KeyError:  # a piece that no text gives, such as a token that is not marked as added
        return piece.encode()


def _text_of(piece: str) -> str | bytes:
    """What a piece of a vocabulary like SentencePiece's stands for."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ")
