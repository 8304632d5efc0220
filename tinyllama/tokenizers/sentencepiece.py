"""Text to token ids and back, with SentencePiece models as LLaMA uses them.

    encode   text -> SentencePiece pieces -> ids; a character without a piece becomes its UTF-8
             bytes, one byte piece (`<0x0A>`) each ("byte fallback")
    decode   ids -> bytes -> text, one id at a time, holding back an unfinished character
    train    byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) with LLaMA's settings

`decode(encode(text)) == text` for every text that UTF-8 can hold, if the model has byte pieces and
leaves the text as it is (LLaMA's and Mistral's do, and those trained here). SentencePiece alone
breaks that for one character: it writes a space as U+2581, so a real U+2581 came back as a space.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from tinyllama.errors import TokenizerError, reason
from tinyllama.system.files import atomic_write

MODEL_FILE = "tokenizer.model"
TRAINING = 1  # of train_tokenizer: another number where the same texts give another model

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# SentencePiece slows down and takes some 60 bytes a character on long texts: feed it less at once.
_LINES_CHARS = 4096
_LONGEST_CHARS = 1 << 20
# Appended protobuf fields are merged: this one sets normalizer_spec.add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# The codec marks an invalid byte by a lone surrogate; like SentencePiece we show it as U+FFFD.
_REPLACE_INVALID = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")

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
# Indents, blank lines and both kinds of line ends, between words that the model has a piece for.
_TRIED = (
    "{0} {1}\n{0}\n\n\n{1}\n{1}",
    "{0}\n    {1}\n\t{0} \n {1}  \n  \n {0}",
    "{1}\r\n{0}\r\n\r\n{0}",
    "\n\n{0}",
    "  {1}\n",
)


class Tokenizer:
    """A SentencePiece model, held as its bytes.

    vocab_size, bos_id, eos_id: int. fingerprint: hex SHA-256 of the model's bytes.
    `source` names the model in errors. Raises TokenizerError if the bytes are no usable model.
    """

    def __init__(self, model: bytes, source: str = "tokenizer") -> None:
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = _load_processor(model, source)
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        for name, piece in (("begin", self.bos_id), ("end", self.eos_id)):
            if piece < 0:
                raise TokenizerError(f"{source}: the model has no piece for the {name} of a text")
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        self._pieces = pieces
        self._surfaces = self._make_surfaces(pieces)
        first: list[str] = self._processor.encode("a", out_type=str)
        self._has_dummy_prefix = first[:1] != [] and first[0].startswith(_SPACE)
        # Where a piece can contain a line end, cutting there would change the ids.
        self._cuts_lines = not any("\n" in piece and piece != "\n" for piece in pieces)
        self._cut_chars = _LINES_CHARS

    @cached_property
    def vocabulary_digest(self) -> str:
        """Hex SHA-256 of the pieces in the order of their ids: what embeddings belong to."""
        return hashlib.sha256(json.dumps(self._pieces).encode()).hexdigest()

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of `text`, without begin and end. `continued`: other text comes before this one,
        so LLaMA's space before the first word is left out. Raises TokenizerError for a text that
        UTF-8 cannot hold (half of a surrogate pair)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise TokenizerError(f"the text holds {place}, which UTF-8 cannot encode") from None
        ids: list[int] = []
        is_long = continued or len(text) > self._cut_chars
        joint = self._joint if is_long and self._cuts_lines else None
        chars = _LONGEST_CHARS if joint is None else self._cut_chars
        parts = text.split(_SPACE) if self._space_ids else [text]
        for number, part in enumerate(parts):
            if number:
                ids += self._space_ids
            before = "\n" if continued and number == 0 else "."[: len(ids)]  # the character
            for piece in _cut(part, chars, joint):
                at_line_end = "\n" in (before, piece[:1])
                own_space = at_line_end and joint is not None and joint.own_space
                inside = before and not own_space
                ids += (self._continuing if inside else self._processor).encode(piece)
                before = piece[-1:]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; begin and end give none, bytes that are not UTF-8 give U+FFFD each."""
        stream = self.stream()
        return "".join([stream.push(piece) for piece in ids]) + stream.flush()

    def stream(self, *, continued: bool = False) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time. `continued`: they follow other text, so a
        space before the first word is kept."""
        return StreamDecoder(self._surfaces, strip=self._has_dummy_prefix and not continued)

    def save(self, folder: str | Path) -> Path:
        """Write the model, byte for byte, as `folder/tokenizer.model`."""
        path = Path(folder) / MODEL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, self.model)
        return path

    @cached_property
    def ids_version(self) -> int:
        """Another number where long texts now have other ids than an earlier version gave them."""
        return 1 if not self._cuts_lines or self._joint == _JOINTS[0] else 2

    @cached_property
    def _joint(self) -> _Joint | None:
        """Where this model's texts can be cut without changing the ids, by trying; None if nowhere.
        Its normalizer may turn line ends into spaces, merge spaces, strip them from both ends."""
        pieces = (surface for surface in self._surfaces if isinstance(surface, str))
        named = (piece.strip() for piece in pieces if " " in piece and piece.strip().isalpha())
        words = [*itertools.islice(named, 2), "at", "e"]
        texts = [text.format(*words) for text in _TRIED]
        holding = (joint for joint in _JOINTS if all(self._holds(joint, text) for text in texts))
        return next(holding, None)

    def _holds(self, joint: _Joint, text: str) -> bool:
        """Whether a text has the ids of the whole wherever it is cut at this joint."""
        first = self._processor
        follows = first if joint.own_space else self._continuing
        whole = first.encode(text)
        cuts = [match.end() for match in joint.pattern.finditer(text)]
        return all(first.encode(text[:at]) + follows.encode(text[at:]) == whole for at in cuts)

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space that LLaMA puts before a text."""
        if not self._has_dummy_prefix:
            return self._processor
        return _load_processor(self.model + _NO_DUMMY_PREFIX, "tokenizer")

    @cached_property
    def _space_ids(self) -> list[int]:
        """Byte pieces of U+2581 itself, or none where the model has no byte pieces."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        return ids if all(self._processor.is_byte(ids)) else []

    def _make_surfaces(self, pieces: Sequence[str]) -> list[str | bytes]:
        """What each id stands for: text, or bytes (of a character's UTF-8)."""
        ids = list(range(self.vocab_size))
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
        return surfaces


class StreamDecoder:
    """Ids in, text out, as soon as a character is whole.

    What `push` and the final `flush` return, joined, is `Tokenizer.decode` of the ids.
    """

    def __init__(self, surfaces: Sequence[str | bytes], *, strip: bool) -> None:
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a SentencePiece model: the file, or a folder that holds `tokenizer.model`.

    Raises TokenizerError if it is missing or not a SentencePiece model.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        hint = ""
        if (path / "tokenizer.json").is_file():
            hint = "; its tokenizer.json is of another kind, which is not supported yet"
        raise TokenizerError(f"{path}: the folder holds no {MODEL_FILE}{hint}")
    try:
        model = file.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"{file}: no such file") from None
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {reason(error)}") from error
    return Tokenizer(model, str(file))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out_file: str | Path | None = None
) -> Tokenizer:
    """Train a byte-pair model as LLaMA's was made, write it to `out_file` (if given), return it.

    `texts` is read once; what is kept of it is bounded (32 Mi characters, spread evenly), so it may
    be a generator over any amount. Ids: 0 unknown, 1 begin, 2 end, then 256 bytes, then pieces.
    The same texts give the same model, byte for byte. Raises TokenizerError if the texts are too
    few for `vocab_size`, or it is too small for the characters in them.
    """
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
    tokenizer = Tokenizer(written.getvalue(), str(out_file or "trained tokenizer"))
    if out_file is not None:
        Path(out_file).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out_file, tokenizer.model)
    return tokenizer


def _load_processor(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Raises TokenizerError if `model` is no SentencePiece model."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.load_from_serialized_proto(model)
    except RuntimeError:
        loaded = False
    if not loaded or processor.get_piece_size() == 0:
        raise TokenizerError(f"{source}: not a SentencePiece model ({len(model)} bytes)")
    return processor


def _cut(text: str, chars: int, joint: _Joint | None = None) -> Iterator[str]:
    """`text` in pieces of about `chars`, cut at a joint (by default after line ends), or anywhere
    past _LONGEST_CHARS."""
    pattern = (joint or _JOINTS[0]).pattern
    start = 0
    while len(text) - start > chars:
        limit = start + _LONGEST_CHARS
        match = pattern.search(text, start + chars - 1, limit)
        if match is None and limit >= len(text):
            break
        end = limit if match is None else match.end()
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _sample(texts: Iterable[str]) -> list[str]:
    """Blocks of the texts, evenly spread over them, of at most _TRAIN_CHARS together.

    Block i has rank i * golden ratio mod 1. When there are too many, the limit that a rank must
    stay below is halved: one pass, bounded memory, no random numbers.
    """
    kept: list[tuple[int, str]] = []
    limit, size = 1 << 64, 0
    blocks = (block for text in texts for block in _cut(text, _BLOCK_CHARS))
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
