"""The file of a SentencePiece model: its pieces and settings, read and written.

It is a protocol buffer, a sequence of (field, value). Of the message ModelProto:

    1  pieces           {1: piece, 2: score, 3: kind}
    2  trainer_spec     {3: model type, 24: spaces behind words, 35: bytes for unknown characters,
                        40 to 43: ids, 45 to 48: pieces, of unknown, begin, end and padding}
    3  normalizer_spec  {2: character map, 3: space before a text, 4: merge spaces,
                        5: write them as U+2581}

Fields that are repeated or appended replace earlier ones. Source: sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A piece; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What decides the ids of a text."""

    pieces: Sequence[Piece]
    kind: int = BPE
    byte_fallback: bool = True
    character_map: bytes = b""  # of the normalizer, empty for none
    adds_space: bool = True  # before the first word
    merges_spaces: bool = False
    spaces_behind: bool = False  # a space belongs to the word before it
    escapes_spaces: bool = True  # a space is U+2581 in the pieces


def read_model(data: bytes) -> Model:
    """Parse a model that the library has accepted. Raises ValueError for one it would not."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field == 2 and isinstance(value, bytes):
            trainer |= _fields(value)
        elif field == 3 and isinstance(value, bytes):
            normalizer |= _fields(value)
    return Model(
        pieces,
        kind=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, False)),
        character_map=bytes(normalizer.get(2, b"") or b""),
        adds_space=bool(normalizer.get(3, True)),
        merges_spaces=bool(normalizer.get(4, True)),
        spaces_behind=bool(trainer.get(24, False)),
        escapes_spaces=bool(normalizer.get(5, True)),
    )


def write_model(
    pieces: Sequence[Piece],
    *,
    unknown_id: int,
    bos_id: int | None,
    eos_id: int | None,
    adds_space: bool,
    merges_spaces: bool,
) -> bytes:
    """The file of a byte-pair model with bytes for unknown characters, as LLaMA's."""
    trainer = _field(3, BPE) + _field(4, len(pieces)) + _field(35, 1)
    named = ((40, 45, unknown_id), (41, 46, bos_id), (42, 47, eos_id), (43, 48, None))
    for id_field, text_field, number in named:
        trainer += _field(id_field, -1 if number is None else number)
        if number is not None:
            trainer += _field(text_field, pieces[number].text.encode())
    normalizer = _field(1, b"identity") + _field(3, int(adds_space))
    normalizer += _field(4, int(merges_spaces)) + _field(5, 1)
    return b"".join(
        [
            *(_field(1, _piece_bytes(piece)) for piece in pieces),
            _field(2, trainer),
            _field(3, normalizer),
        ]
    )


def with_space(data: bytes, adds_space: bool) -> bytes:
    """The same model, with or without the space before a text."""
    return data + _field(3, _field(3, int(adds_space)))


def read_places(data: bytes, text: str) -> Iterator[tuple[int, int, int]]:
    """(id, begin, end) in characters of each piece of an encoded text, from SentencePiece's own
    message, which counts bytes. A piece that is a byte within a character has no width."""
    characters = [n for n, character in enumerate(text) for _ in character.encode()] + [len(text)]
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            fields = dict(_fields(value))
            piece, begin, end = (int(fields.get(key, 0)) for key in (2, 4, 5))
            yield piece, characters[begin], characters[end]


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    text, score, kind = values.get(1, b""), values.get(2, 0), values.get(3, NORMAL)
    if not isinstance(text, bytes) or isinstance(score, bytes) or isinstance(kind, bytes):
        raise ValueError("a piece is damaged")
    return Piece(text.decode(), struct.unpack("<f", struct.pack("<I", score))[0], kind)


def _piece_bytes(piece: Piece) -> bytes:
    score = _varint(2 << 3 | _FIXED32) + struct.pack("<f", piece.score)
    return _field(1, piece.text.encode()) + score + _field(3, piece.kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: numbers of 32 and 64 bits as they lie, texts as bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _read_varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"no field has kind {kind}")
        part, at = data[at : at + length], at + length
        if at > len(data):
            raise ValueError("truncated")
        yield tag >> 3, part if kind == _BYTES else int.from_bytes(part, "little")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, the place behind it); seven bits per byte, lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is longer than 64 bits")


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(value & ((1 << 64) - 1))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
