"""A tokenizer's files as the metadata of GGUF: tokens, scores or merges, types, templates.

    tokenizer.model                     "llama": SentencePiece's byte-pair encoding, by scores
    tokenizer.json with byte fallback   "llama" too: a score is the rank of the merge, negated
    tokenizer.json of bytes             "gpt2": merges, and a name of llama.cpp's for the pattern
                                        that cuts texts into words before they are merged

llama.cpp has no pattern of its own in a file, so a tokenizer whose words it cannot cut is refused.
Rows of the model without a piece become unused ones. Source: conversion/ of llama.cpp.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.files import JSON_FILE, MODEL_FILE, Settings, read_settings
from tinyllama.tokenizers.gguf import GPT2, RULES
from tinyllama.tokenizers.huggingface import JsonTokenizer
from tinyllama.tokenizers.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_model,
)
from tinyllama.tokenizers.tokenizer import SpecialToken, Tokenizer

_UNUSED_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_SPACE = "\u2581"  # how a space is written inside a piece
# How a space inside a merge is written, since merges are joined by one.
_INNER_SPACE = chr(ord(" ") + 256)

# What llama.cpp calls patterns: of several names for one rule, the first.
_NAMES = {rule: name for name, rule in reversed(RULES.items())}


@dataclass
class _Vocabulary:
    """Pieces in the order of their ids; scores or merges; other keys of tokenizer.ggml."""

    model: str
    pieces: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def place(self, number: int, piece: str, kind: int, score: float) -> None:
        """Set a piece, or append the next one."""
        self.pieces[number : number + 1] = [piece]
        self.kinds[number : number + 1] = [kind]
        if self.scores is not None:
            self.scores[number : number + 1] = [score]


def vocabulary_fields(tokenizer: Tokenizer, rows: int, source: str) -> dict[str, Any]:
    """The metadata of a tokenizer in a model with `rows` embeddings.

    Raises TokenizerError, beginning with `source`, for what llama.cpp lacks.
    """
    files = tokenizer.files
    settings = read_settings(files, source)
    if MODEL_FILE in files and not isinstance(tokenizer, JsonTokenizer):
        vocabulary = _of_sentencepiece(files[MODEL_FILE], source)
    elif JSON_FILE in files:
        vocabulary = _of_json(json.loads(files[JSON_FILE]), source)
    else:
        raise TokenizerError(f"{source}: its tokenizer has neither {MODEL_FILE} nor {JSON_FILE}")
    if settings.adds_space is not None and vocabulary.scores is not None:
        vocabulary.extra["add_space_prefix"] = settings.adds_space
    _add(vocabulary, settings.added, rows, source)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.token_type": vocabulary.kinds,
    }
    if vocabulary.scores is not None:
        fields["tokenizer.ggml.scores"] = vocabulary.scores
    if vocabulary.merges:
        fields["tokenizer.ggml.merges"] = vocabulary.merges
    extra = vocabulary.extra | _special(vocabulary, settings, tokenizer)
    extra["add_bos_token"] = bool(tokenizer.begin)
    extra["add_eos_token"] = bool(settings.adds_eos)
    fields |= {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


# ---- pieces added beside the vocabulary


def _add(
    vocabulary: _Vocabulary, added: Mapping[int, SpecialToken], rows: int, source: str
) -> None:
    """Place added tokens, and fill up to the model's rows."""
    most = max([len(vocabulary.pieces) - 1, *added])
    if most >= rows:
        raise TokenizerError(
            f"{source}: the tokenizer has an id {most}, must be below {rows}, the rows of the "
            "model's embedding"
        )
    for number in range(len(vocabulary.pieces), rows):
        vocabulary.place(number, f"[PAD{number}]", UNUSED, _UNUSED_SCORE)
    for number, token in added.items():
        if vocabulary.kinds[number] in (UNKNOWN, BYTE):
            continue
        if token.special:
            vocabulary.place(number, token.content, CONTROL, _ADDED_SCORE)
        else:  # spaces of a piece that is matched in the text itself are spaces
            text = token.content.replace(_SPACE, " ")
            vocabulary.place(number, text, USER_DEFINED, _ADDED_SCORE)
    seen: set[str] = set()
    for piece in vocabulary.pieces:
        if piece in seen:
            raise TokenizerError(f"{source}: {piece!r} is the piece of two ids, as in no GGUF file")
        seen.add(piece)


def _special(vocabulary: _Vocabulary, settings: Settings, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of special pieces by GGUF's key."""
    number_of = {piece: number for number, piece in enumerate(vocabulary.pieces)}

    def named(role: str) -> int | None:
        return number_of.get(settings.roles.get(role, ""))

    stops = [stop for stop in tokenizer.eos_ids if stop < len(vocabulary.pieces)]
    end = named("eos")
    if end not in stops:
        end = stops[0] if stops else None
    others = [stop for stop in stops if stop != end]
    unknown = named("unk")
    if unknown is None and UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.kinds.index(UNKNOWN)
    ids = {
        "bos": tokenizer.bos_id,
        "eos": end,
        "unknown": unknown,
        "padding": named("pad"),
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
    }
    return {f"{key}_token_id": number for key, number in ids.items() if number is not None}


# ---- tokenizer.json


def _of_json(described: Mapping[str, Any], source: str) -> _Vocabulary:
    model = described.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(
            f"{source}: tokenizer.json: model.type: got {model.get('type')!r}, must be 'BPE': "
            "llama.cpp has no other for this architecture"
        )
    ids = {int(number): str(piece) for piece, number in model["vocab"].items()}
    pieces = [ids.get(number, f"[PAD{number}]") for number in range(max(ids, default=-1) + 1)]
    kinds = [NORMAL if number in ids else UNUSED for number in range(len(pieces))]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _with_scores(described, pieces, kinds, merges, source)
    name = pre_tokenizer_name(described, source)
    joined = [" ".join(part.replace(" ", _INNER_SPACE) for part in pair) for pair in merges]
    return _Vocabulary("gpt2", pieces, kinds, merges=joined, extra={"pre": name})


def _with_scores(
    described: Mapping[str, Any],
    pieces: list[str],
    kinds: list[int],
    merges: Sequence[Sequence[str]],
    source: str,
) -> _Vocabulary:
    """LLaMA's and Mistral's form of a SentencePiece model: a score per piece gives the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(piece, len(merges))) for piece in pieces]
    unknown = (described.get("model") or {}).get("unk_token")
    for number, piece in enumerate(pieces):
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kinds[number] = BYTE
        elif piece == unknown:
            kinds[number] = UNKNOWN
    return _Vocabulary(
        "llama",
        pieces,
        kinds,
        scores=scores,
        extra={"pre": "default", "add_space_prefix": _adds_space(described, source)},
    )


def _adds_space(described: Mapping[str, Any], source: str) -> bool:
    """Whether a text gets a space before its first word. Raises TokenizerError for another
    normalizer than LLaMA's."""
    normalizers = list(_flat(described.get("normalizer"), "normalizers"))
    words = list(_flat(described.get("pre_tokenizer"), "pretokenizers"))
    for step in (*normalizers, *words):
        is_space = step.get("type") == "Prepend" and step.get("prepend") == _SPACE
        is_replace = step.get("type") == "Replace" and step.get("content") == _SPACE
        if not (is_space or is_replace or step.get("type") == "Metaspace"):
            raise TokenizerError(
                f"{source}: tokenizer.json: {step.get('type')!r} before the byte-pair encoding is "
                "not in llama.cpp"
            )
    schemes = [step.get("prepend_scheme", "always") for step in words]
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        scheme != "never" for scheme in schemes
    )


def pre_tokenizer_name(described: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name for how a tokenizer.json of bytes cuts texts into words.

    Raises TokenizerError where it has none.
    """
    normalizers = [str(s.get("type")) for s in _flat(described.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise TokenizerError(
            f"{source}: tokenizer.json: normalizer: got {', '.join(normalizers)}, which llama.cpp "
            "does not apply"
        )
    steps = [*_flat(described.get("pre_tokenizer"), "pretokenizers")]
    patterns = [pattern for step in steps for pattern in _patterns(step)]
    whole_words = bool((described.get("model") or {}).get("ignore_merges"))
    fitting = {
        rule.composes: name
        for rule, name in _NAMES.items()
        if (list(rule.patterns), rule.whole_words) == (patterns, whole_words)
    }
    if fitting:  # llama.cpp itself never composes, so that a rule that does not fits as well
        return fitting.get(bool(normalizers)) or next(iter(fitting.values()))
    raise TokenizerError(
        f"{source}: tokenizer.json: pre_tokenizer: got {patterns} (ignore_merges {whole_words}), "
        f"for which llama.cpp has no name that is known here ({', '.join(_NAMES.values())})"
    )


def _patterns(step: Mapping[str, Any]) -> Iterator[str]:
    """The expressions that a pre-tokenizer cuts words by; of one with other settings than those of
    RULES, its own text."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield GPT2
    elif kind == "Digits" and step.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern") or {}
        yield pattern.get("Regex") or re.escape(pattern.get("String", ""))
    else:
        yield json.dumps(step, sort_keys=True)


def _flat(step: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a post-processor, without sequences."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for inner in step.get(key) or ():
        yield from _flat(inner, key)


# ---- tokenizer.model


def _of_sentencepiece(data: bytes, source: str) -> _Vocabulary:
    label = f"{source}: {MODEL_FILE}"
    try:
        model = read_model(data)
    except ValueError as error:
        raise TokenizerError(f"{label}: damaged: {error}") from error
    if model.kind != BPE or model.spaces_behind:
        found = "spaces behind words" if model.spaces_behind else "no byte-pair encoding"
        raise TokenizerError(
            f"{label}: has {found}, and llama.cpp has nothing else for this architecture"
        )
    extra = {
        "pre": "default",
        "add_space_prefix": model.adds_space,
        "remove_extra_whitespaces": model.merges_spaces,
    }
    return _Vocabulary(
        "llama",
        [piece.text for piece in model.pieces],
        [piece.kind for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        extra=extra,
    )
