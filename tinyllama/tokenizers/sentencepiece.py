"""Text to token ids and back, with SentencePiece models as LLaMA uses them.

    encode   text -> SentencePiece pieces -> ids; a character without a piece becomes its UTF-8
             bytes, one byte piece (`<0x0A>`) each ("byte fallback")
    decode   ids -> bytes -> text, one id at a time, holding back an unfinished character
    train    byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) with LLaMA's settings

`decode(encode(text)) == text` for every text that UTF-8 can hold, if the model has byte pieces and
leaves the text as it is (LLaMA's and Mistral's do, and those trained here). SentencePiece alone
breaks that for one character: it writes a space as U+2581, so a real U+2581 came back as a space.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tinyllama.errors import TokenizerError
from tinyllama.system.files import atomic_write
from tinyllama.tokenizers import special
from tinyllama.tokenizers.cutting import LINE_END, LONGEST_CHARS, cut, holds
from tinyllama.tokenizers.files import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    parse,
    read_settings,
    to_compact_json,
    to_json,
)
from tinyllama.tokenizers.sentencepiece_json import can_be_written, tokenizer_json
from tinyllama.tokenizers.sentencepiece_model import (
    USER_DEFINED,
    Model,
    read_model,
    read_places,
    with_space,
)
from tinyllama.tokenizers.tokenizer import Span, SpecialToken, StreamDecoder, check_encodable

if TYPE_CHECKING:
    import sentencepiece

TRAINING = 1  # version of train_tokenizer: changes when the same texts give a different model

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# SentencePiece slows down and takes 60 bytes per character on long texts: they are cut.
_LINES_CHARS = 4096

# A sample of this size already fixes the merges; SentencePiece holds several copies of it.
_TRAIN_CHARS = 32 << 20
_BLOCK_CHARS = 4096
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples fill 0..2^64 evenly


class _Joint(NamedTuple):
    """Where a long text is cut, and what follows."""

    pattern: re.Pattern[str]  # the cut is behind it
    own_space: bool  # what follows gets a space before its first word, as a text does


_JOINTS = (
    _Joint(re.compile("\n"), False),  # LLaMA's: a line end is a piece of its own
    _Joint(re.compile("\n"), True),  # a line end becomes a space, spaces are merged (spm_train)
    _Joint(re.compile(r"[^\s](?=\n)"), False),  # only one of the two
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")
# Indents, blank lines and both kinds of line ends, between words that the model has a piece for.
_TRIED = (
    "{0} {1}\n{0}\n\n\n{1}\n{1}",
    "{0}\n    {1}\n\t{0} \n {1}  \n  \n {0}",
    "{1}\r\n{0}\r\n\r\n{0}",
    "\n\n{0}",
    "  {1}\n",
    "{0}\ue000\n\ue000{1}",  # unknown characters side by side are one piece
)


class SentencePieceTokenizer:
    """A SentencePiece model and the files beside it; a Tokenizer.

    Tokens that only the files name (added_tokens.json and others) are found before the model sees
    a text. `model` holds the model's bytes; `source` names it in errors. Raises TokenizerError if
    the model is not usable, or the files do not fit it.
    """

    def __init__(
        self, model: bytes, source: str = "tokenizer", files: Mapping[str, bytes] | None = None
    ) -> None:
        self.model = model
        self.sources: Mapping[str, bytes] = {**(files or {}), MODEL_FILE: model}
        self.settings = read_settings(self.sources, source)
        self._processor = own = _load_processor(model, source)
        self._size: int = own.get_piece_size()
        pieces = _texts_of_pieces(own, source)
        added = special.check(self.settings.added, self._size, source)
        self._controls = [n for n in range(self._size) if own.is_control(n) or own.is_unknown(n)]
        self._beyond = self._not_the_models(added, pieces)
        self.pieces = special.extended(pieces, added)
        self.vocab_size = len(self.pieces)
        self._special = {
            **{n: SpecialToken(pieces[n], n) for n in self._controls},
            **{n: token for n, token in added.items() if token.special},
        }
        self.special_tokens: Mapping[str, int] = {t.content: n for n, t in self._special.items()}
        self._surfaces = self._make_surfaces(pieces)
        self._set_ends(source)
        self._set_space()
        # Where a piece can contain a line end, cutting there would change the ids.
        self._cuts_lines = not any("\n" in piece and piece != "\n" for piece in pieces)
        self._cut_chars = _LINES_CHARS

    def _not_the_models(
        self, added: Mapping[int, SpecialToken], pieces: Sequence[str]
    ) -> dict[int, SpecialToken]:
        """The added tokens that the model does not treat as such by itself."""
        own = set(self._controls)
        beyond = {n: t for n, t in added.items() if n not in own or pieces[n] != t.content}
        if any(n < self._size for n in beyond):
            known = self._numbers_of_kind(read_model(self.model), USER_DEFINED)
            beyond = {n: t for n, t in beyond.items() if n not in known or pieces[n] != t.content}
        return beyond

    @staticmethod
    def _numbers_of_kind(model: Model, kind: int) -> set[int]:
        return {number for number, piece in enumerate(model.pieces) if piece.kind == kind}

    def _set_ends(self, source: str) -> None:
        """Begin and end of a text: by the names in the files, else the model's own."""
        numbers = {piece: number for number, piece in reversed([*enumerate(self.pieces)])}
        own = self._processor.bos_id(), self._processor.eos_id()
        bos, eos = (
            numbers.get(self.settings.roles.get(role, ""), number)
            for role, number in zip(("bos", "eos"), own, strict=True)
        )
        self.bos_id: int | None = None if bos < 0 else bos
        self.eos_ids = special.within([eos, *self.settings.eos_ids], self.vocab_size)
        if not self.eos_ids:
            raise TokenizerError(f"{source}: the model has no piece for the end of a text")
        self.eos_id = self.eos_ids[0]
        adds_bos = self.settings.adds_bos is not False
        self.begin: tuple[int, ...] = (bos,) if adds_bos and bos >= 0 else ()
        self._ends_of_model = own

    def _set_space(self) -> None:
        """Take add_prefix_space of the files, which may differ from the model."""
        first: list[str] = self._processor.encode("a", out_type=str)
        self._has_dummy_prefix = first[:1] != [] and first[0].startswith(_SPACE)
        wanted = self.settings.adds_space
        self._space_differs = wanted is not None and wanted != self._has_dummy_prefix
        if wanted is not None and self._space_differs:
            self._processor = _load_processor(with_space(self.model, wanted), "tokenizer")
            self._has_dummy_prefix = wanted

    @property
    def chat_template(self) -> str | None:
        """The text of the Jinja template, if the files hold one."""
        return self.settings.chat_template

    @property
    def has_markup(self) -> bool:
        """Whether texts may hold special tokens besides begin, end, unknown and padding."""
        plain = {*self._ends_of_model, self.bos_id, self.eos_id}
        plain |= {self.special_tokens.get(text) for text in self.settings.roles.values()}
        others = (n for n, token in self._beyond.items() if token.special and n not in plain)
        return self.chat_template is not None or any(True for _ in others)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the model's bytes, and of what the files change of its ids."""
        own = hashlib.sha256(self.model).hexdigest()
        usual = (self._ends_of_model[0],), self._ends_of_model[1]
        changes: list[object] = []
        if (self.begin, self.eos_id) != usual or self._space_differs:
            changes = [self.begin, self.eos_id, self._has_dummy_prefix]
        if self._beyond or self.has_markup:
            changes += [self._prefix_always, [astuple(t) for t in self._special.values()]]
            changes += [astuple(token) for token in self._beyond.values()]
        return (
            own if not changes else hashlib.sha256(json.dumps([own, *changes]).encode()).hexdigest()
        )

    @cached_property
    def vocabulary_digest(self) -> str:
        """Hex SHA-256 of the pieces in the order of their ids: what embeddings belong to."""
        return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

    @property
    def older_digests(self) -> tuple[str, ...]:
        """Such a digest without the tokens that only files name: they were not read once."""
        own = self._processor.id_to_piece(list(range(self._size)))
        return (hashlib.sha256(json.dumps(own).encode()).hexdigest(),)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The files it was made from, and those that transformers needs to open them without
        SentencePiece: a tokenizer.json and a tokenizer_config.json that leaves it as it is."""
        model = read_model(self.model)
        if JSON_FILE in self.sources or not can_be_written(model):
            return self.sources
        ends = (self.eos_id,) if self.settings.adds_eos else ()
        made = tokenizer_json(
            model,
            self.pieces,
            {**self._special, **self._beyond},
            begin=self.begin,
            end=ends,
            adds_space=self._has_dummy_prefix,
            always=self._prefix_always,
        )
        return {
            **self.sources,
            JSON_FILE: to_compact_json(made),
            CONFIG_FILE: to_json(self._config()),
        }

    def _config(self) -> dict[str, object]:
        """The tokenizer_config.json it came with, or a new one, for a tokenizer.json that is
        complete: transformers' own class for LLaMA would replace parts of it."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self._processor.unk_id()}
        ids["pad"] = self._processor.pad_id()
        config = parse(self.sources, CONFIG_FILE, CONFIG_FILE)
        for role, number in ids.items():
            text = self.settings.roles.get(role)
            if number is not None and number >= 0 and text not in self.special_tokens:
                config[f"{role}_token"] = self.pieces[number]
        said = {"add_bos_token": bool(self.begin), "clean_up_tokenization_spaces": False}
        return said | config | {"tokenizer_class": "PreTrainedTokenizerFast"}

    @property
    def joint(self) -> None:
        """Behind every line end: `continued` texts are taken as such."""
        return None

    def encode(self, text: str, *, continued: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, without begin and end. `continued`: other text comes before this one,
        so LLaMA's space before the first word is left out. `special`: special tokens written in
        the text are these tokens. Raises TokenizerError for a text that UTF-8 cannot hold (half
        of a surrogate pair)."""
        check_encodable(text)
        ids: list[int] = []
        parts = (self._markup if special else self._always).split(text)
        for number, (part, token) in enumerate(parts):
            follows = continued if number == 0 else not self._prefix_always
            if part:
                ids += self._encode_part(part, follows)
            if token is not None:
                ids.append(token)
        return ids

    def encode_with_spans(self, text: str, inert: str = "") -> tuple[list[int], list[Span]]:
        """Ids of a text with special tokens, and (begin, end) of each, in characters; see
        Tokenizer."""
        check_encodable(text)
        ids: list[int] = []
        spans: list[Span] = []
        start = at = 0  # in the text, and in it without `inert`
        for begin, end, token in [*self._markup.places(text), (len(text), len(text), None)]:
            part = text[start:begin].replace(inert, "") if inert else text[start:begin]
            for own, first, last in self._located(part, bool(start) and not self._prefix_always):
                ids.append(own)
                spans.append((at + first, at + last))
            at += len(part)
            if token is not None:
                ids.append(token)
                spans.append((at, at + end - begin))
            start, at = end, at + end - begin
        return ids, spans

    def _located(self, text: str, continued: bool) -> Iterator[tuple[int, int, int]]:
        """(id, begin, end) of a text without tokens of the files."""
        at = 0
        for processor, piece in self._runs(text, continued):
            if processor is None:
                yield from ((number, at, at + 1) for number in self._space_ids)
            else:
                found = processor.encode(piece, out_type="serialized_proto")
                for number, begin, end in read_places(found, piece):
                    yield number, at + begin, at + end
            at += len(piece)

    def _encode_part(self, text: str, continued: bool) -> list[int]:
        """Ids of a text without tokens of the files."""
        ids: list[int] = []
        for processor, piece in self._runs(text, continued) if text else ():
            ids += self._space_ids if processor is None else processor.encode(piece)
        return ids

    def _runs(
        self, text: str, continued: bool
    ) -> Iterator[tuple[sentencepiece.SentencePieceProcessor | None, str]]:
        """A text in pieces that SentencePiece takes fast, and what encodes each: None for the
        character that stands for a space inside a piece."""
        is_long = continued or len(text) > self._cut_chars
        joint = self._joint if is_long and self._cuts_lines else None
        chars = LONGEST_CHARS if joint is None else self._cut_chars
        parts = text.split(_SPACE) if self._space_ids else [text]
        is_first = True
        for number, part in enumerate(parts):
            if number:
                yield None, _SPACE
                is_first = False
            before = "\n" if continued and number == 0 else "."[: not is_first]  # the character
            for piece in cut(part, chars, LINE_END if joint is None else joint.pattern):
                at_line_end = "\n" in (before, piece[:1])
                own_space = at_line_end and joint is not None and joint.own_space
                inside = before and not own_space
                yield (self._continuing if inside else self._processor), piece
                is_first, before = False, piece[-1:]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; begin and end give none, or their own text with `special`; bytes that are
        not UTF-8 give U+FFFD each."""
        stream = self.stream(special=special)
        return "".join([stream.push(piece) for piece in ids]) + stream.flush()

    def stream(self, *, continued: bool = False, special: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one at a time. `continued`: they follow other text, so a
        space before the first word is kept."""
        surfaces = self._surfaces_with_special if special else self._surfaces
        return StreamDecoder(surfaces, strip=self._has_dummy_prefix and not continued)

    @cached_property
    def _always(self) -> special.Finder:
        """The tokens that are found in every text."""
        return special.Finder(token for token in self._beyond.values() if not token.special)

    @cached_property
    def _markup(self) -> special.Finder:
        """The tokens that are found in a text with special tokens."""
        return special.Finder([*self._beyond.values(), *self._special.values()])

    @cached_property
    def _prefix_always(self) -> bool:
        """Whether each text between special tokens begins with a space, as in transformers' first
        versions ("legacy"), or only a text that none precedes. Where nothing says so, it does if
        characters may be removed at its begin: tokenizer.json could not tell that begin."""
        if self.settings.legacy is not None:
            return self.settings.legacy
        model = read_model(self.model)
        return model.merges_spaces or bool(model.character_map)

    @cached_property
    def ids_version(self) -> int:
        """2 if an earlier version gave long texts different ids, else 1."""
        return 1 if not self._cuts_lines or self._joint == _JOINTS[0] else 2

    @cached_property
    def _joint(self) -> _Joint | None:
        """Where this model's texts can be cut without changing the ids, by trying; None if nowhere.
        Its normalizer may turn line ends into spaces, merge spaces, strip them from both ends."""
        pieces = (surface for surface in self._surfaces if isinstance(surface, str))
        named = (piece.strip() for piece in pieces if " " in piece and piece.strip().isalpha())
        words = [*itertools.islice(named, 2), "at", "e"]
        texts = [text.format(*words) for text in _TRIED]
        for joint in _JOINTS:
            follows = self._processor if joint.own_space else self._continuing
            if holds(joint.pattern, texts, self._processor.encode, follows.encode):
                return joint
        return None

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space that LLaMA puts before a text."""
        if not self._has_dummy_prefix:
            return self._processor
        return _load_processor(with_space(self.model, False), "tokenizer")

    @cached_property
    def _space_ids(self) -> list[int]:
        """Byte pieces of U+2581 itself, or none where the model has no byte pieces."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        return ids if all(self._processor.is_byte(ids)) else []

    def _make_surfaces(self, pieces: Sequence[str]) -> list[str | bytes]:
        """What each id stands for: text, or bytes (of a character's UTF-8)."""
        ids = list(range(self._size))
        surfaces: list[str | bytes] = [piece.replace(_SPACE, " ") for piece in pieces]
        for piece, is_byte, is_control in zip(
            ids, self._processor.is_byte(ids), self._processor.is_control(ids), strict=True
        ):
            if is_byte:
                surfaces[piece] = bytes([int(pieces[piece][3:5], 16)])
            elif is_control:
                surfaces[piece] = ""
        unknown = self._processor.unk_id()  # as bytes: its space is not a word's, never stripped
        surfaces[unknown] = self._processor.decode([unknown]).encode()
        surfaces += self.pieces[self._size :]
        for token in self._beyond.values():  # as bytes, so that no space of theirs is stripped
            surfaces[token.id] = "" if token.special else token.content.encode()
        return surfaces

    @cached_property
    def _surfaces_with_special(self) -> list[str | bytes]:
        surfaces = [*self._surfaces]
        for number, token in self._special.items():
            surfaces[number] = token.content.encode()
        return surfaces


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out_file: str | Path | None = None
) -> SentencePieceTokenizer:
    """Train a byte-pair model as LLaMA's was made, write it to `out_file` (if given), return it.

    `texts` is read once; what is kept of it is bounded (32 Mi characters, spread evenly), so it may
    be a generator over any amount. Ids: 0 unknown, 1 begin, 2 end, then 256 bytes, then pieces.
    The same texts give the same model, byte for byte. Raises TokenizerError if the texts are too
    few for `vocab_size`, or it is too small for the characters in them.
    """
    import sentencepiece  # here: other tokenizers do not need it

    blocks = _sample(texts)
    lines = (line for block in blocks for line in _training_lines(block))
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=4 * _BLOCK_CHARS + 1,  # in bytes, so no line is skipped
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=16,  # fixed: the number is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain_training(str(error), vocab_size)) from error
    tokenizer = SentencePieceTokenizer(written.getvalue(), str(out_file or "trained tokenizer"))
    if out_file is not None:
        Path(out_file).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out_file, tokenizer.model)
    return tokenizer


def _texts_of_pieces(own: sentencepiece.SentencePieceProcessor, source: str) -> list[str]:
    """The text of every piece. Raises TokenizerError if one is not UTF-8."""
    try:
        pieces: list[str] = own.id_to_piece(list(range(own.get_piece_size())))
    except UnicodeDecodeError:
        raise TokenizerError(f"{source}: damaged: a piece that is not UTF-8") from None
    return pieces


def _load_processor(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Raises TokenizerError if `model` is not a SentencePiece model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.load_from_serialized_proto(model)
    except (RuntimeError, UnicodeDecodeError):  # the latter of a message that quotes the model
        loaded = False
    if not loaded and _TIKTOKEN.match(model):
        raise TokenizerError(
            f"{source}: a list of tiktoken's, as Meta's LLaMA 3 has it, which cannot be read: take"
            " the tokenizer.json of the same model in the Hugging Face form"
        )
    if not loaded or processor.get_piece_size() == 0:
        raise TokenizerError(f"{source}: not a SentencePiece model ({len(model)} bytes)")
    if not 0 <= processor.unk_id() < processor.get_piece_size():
        raise TokenizerError(f"{source}: damaged: none of its pieces is the unknown one")
    return processor


def _sample(texts: Iterable[str]) -> list[str]:
    """Blocks of the texts, evenly spread over them, of at most _TRAIN_CHARS together.

    Block i has rank i * golden ratio mod 1. When there are too many, the limit that a rank must
    stay below is halved: one pass, bounded memory, no random numbers.
    """
    kept: list[tuple[int, str]] = []
    limit, size = 1 << 64, 0
    blocks = (block for text in texts for block in cut(text, _BLOCK_CHARS))
    for number, block in enumerate(blocks):
        rank = number * _GOLDEN % (1 << 64)
        if rank < limit:
            kept.append((rank, block))
            size += len(block)
        while size > _TRAIN_CHARS:
            limit //= 2
            kept = [(rank, block) for rank, block in kept if rank < limit]
            size = sum(len(block) for _, block in kept)
    return [block for _, block in kept]


def _training_lines(block: str) -> Iterator[str]:
    """Lines as the trainer takes them: short, and free of the characters it reserves (it would
    skip the line). Line ends are left to the byte pieces, as in LLaMA's own model."""
    for line in block.translate({0: " ", 0x2581: " ", 0x2585: " "}).split("\n"):
        for start in range(0, len(line), _BLOCK_CHARS):
            yield line[start : start + _BLOCK_CHARS]


def _explain_training(error: str, vocab_size: int) -> str:
    """SentencePiece's error in our words."""
    size = f"vocab_size {vocab_size}: "
    if most := re.search(r"set it to a value <= (\d+)", error):
        limit = f"the texts give at most {most[1]} pieces"
        return f"{size}{limit}: set {most[1]} or less, or train on more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        need = f"the characters in the texts alone need {least[1]} pieces"
        return f"{size}{need}: set {least[1]} or more"
    if "sentences_.empty()" in error:
        return "cannot train a tokenizer: the texts are empty"
    return f"cannot train a tokenizer with vocab_size {vocab_size}: {error}"
