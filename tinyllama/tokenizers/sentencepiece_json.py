"""A tokenizer.json that gives the ids of a SentencePiece model.

transformers opens it without the packages sentencepiece and protobuf, and as it is, whatever the
model is called. Byte pairs are merged in the order of their scores; SentencePiece's character map,
merged spaces and the space before a text become normalizers.

One text differs: where a text holds U+2581 itself, SentencePiece and this file take it for a space.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tinyllama.tokenizers.sentencepiece_model import (
    BPE,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
)
from tinyllama.tokenizers.tokenizer import SpecialToken

_SPACE = "\u2581"
_MERGED = (NORMAL, USER_DEFINED, UNUSED)  # the kinds that pairs are made of


def can_be_written(model: Model) -> bool:
    """Whether a tokenizer.json can do what the model does."""
    return model.kind in (BPE, UNIGRAM) and not model.spaces_behind and model.escapes_spaces


def tokenizer_json(
    model: Model,
    pieces: Sequence[str],
    added: Mapping[int, SpecialToken],
    *,
    begin: Sequence[int],
    end: Sequence[int],
    adds_space: bool,
    always: bool,
) -> dict[str, Any]:
    """The contents of the file.

    pieces: text of every id, added tokens included. begin, end: what is put around a text.
    adds_space: a space is put before a text, and if `always` before each text between special
    tokens too.
    """
    names = [piece or f"<unused_{number}>" for number, piece in enumerate(pieces)]
    steps = [*(_SPACE_FIRST if adds_space and not always else []), *_user_defined(model)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [asdict(token) for _, token in sorted(added.items())],
        "normalizer": _sequence("normalizers", _normalizers(model, adds_space and always)),
        "pre_tokenizer": _sequence("pretokenizers", steps) if steps else None,
        "post_processor": around(names, begin, end),
        "decoder": _sequence("decoders", _decoders(adds_space)),
        "model": (_byte_pairs if model.kind == BPE else _unigrams)(model, names),
    }


def around(
    pieces: Sequence[str], begin: Sequence[int], end: Sequence[int]
) -> dict[str, Any] | None:
    """The post-processor that puts tokens around each text; None for no tokens."""
    if not begin and not end:
        return None

    def special(numbers: Iterable[int], part: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": pieces[n], "type_id": part}} for n in numbers]

    def framed(name: str, part: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": part}}
        return [*special(begin, part), text, *special(end, part)]

    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {
            pieces[n]: {"id": pieces[n], "ids": [n], "tokens": [pieces[n]]} for n in (*begin, *end)
        },
    }


# Prepends a space to a text that none precedes, also to one that begins with a space: the first
# step would not add its own character twice, so that is not U+2581 yet.
_SPACE_FIRST = [
    {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False},
    {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False},
]


def _normalizers(model: Model, prepends: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.character_map:
        characters = base64.b64encode(model.character_map).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": characters})
    if model.merges_spaces:
        steps += [
            _replace({"Regex": r"\A +| +\z"}, ""),
            _replace({"Regex": " {2,}"}, " "),
        ]
    if prepends:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, _replace({"String": " "}, _SPACE)]


def _user_defined(model: Model) -> list[dict[str, Any]]:
    """Pieces that are found in every text, as words of their own."""
    texts = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED and piece.text]
    if not texts:
        return []
    pattern = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return [{**split, "pattern": {"Regex": pattern}}]


def _decoders(adds_space: bool) -> list[dict[str, Any]]:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [
        _replace({"String": _SPACE}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if adds_space else []),
    ]


def _byte_pairs(model: Model, names: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(model, names),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # Else such a word would be made of its letters.
        "ignore_merges": any(piece.kind == USER_DEFINED for piece in model.pieces),
        "vocab": {name: number for number, name in enumerate(names)},
        "merges": _merges(model),
    }


def _merges(model: Model) -> list[list[str]]:
    """Every pair that makes a piece, the pair of the highest score first."""
    scores = {p.text: p.score for p in model.pieces if p.kind in _MERGED and p.text}
    pairs: list[list[str]] = []
    for piece in sorted(scores, key=lambda text: -scores[text]):
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                pairs.append([piece[:at], piece[at:]])
    return pairs


def _unigrams(model: Model, names: Sequence[str]) -> dict[str, Any]:
    lowest = min((p.score for p in model.pieces if p.kind == NORMAL), default=0.0)
    scores = [p.score for p in model.pieces] + [lowest] * (len(names) - len(model.pieces))
    unknown = _unknown(model, names)
    return {
        "type": "Unigram",
        "unk_id": None if unknown is None else names.index(unknown),
        "vocab": [[name, score] for name, score in zip(names, scores, strict=True)],
        "byte_fallback": model.byte_fallback,
    }


def _unknown(model: Model, names: Sequence[str]) -> str | None:
    unknown = (n for n, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    return next((names[number] for number in unknown), None)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}
