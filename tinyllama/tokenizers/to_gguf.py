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
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNUSED_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_SPACE = "\u2581"  # how a space is written inside a piece
# How a space inside a merge is written, since merges are joined by one.
_INNER_SPACE = chr(ord(" ") + 256)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{0}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{0}"
    r"|{1}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED.replace("{0}", "").replace("{1}", r"\p{N}")
_GPT4O = _CASED.replace("{0}", f"{_CONTRACTIONS}?").replace("{1}", r"\p{N}{1,3}")

Step = tuple[Any, ...]
_WORDS: Step = ("ByteLevel", True)  # GPT-2's own pattern
_BYTES: Step = ("ByteLevel", False)


def _split(pattern: str) -> Step:
    return ("Split", pattern)


# (steps, ignore_merges) -> llama.cpp's name; of several names for one behaviour, the best known.
_PRE_TOKENIZERS: dict[tuple[tuple[Step, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((_split(_LLAMA3), _BYTES), True): "llama-bpe",
    ((_split(_LLAMA3), _BYTES), False): "dbrx",
    ((_split(_QWEN2), _BYTES), False): "qwen2",
    ((_split(_TEKKEN), _BYTES), True): "tekken",
    ((_split(_GPT4O), _BYTES), False): "gpt-4o",
    (
        (
            *map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
            ("Digits", True),
            _BYTES,
        ),
        False,
    ): "deepseek-coder",
}


@dataclass
class _Vocabulary:
    """Pieces in the order of their ids; scores or merges; other keys of tokenizer.ggml."""

    model: str
    pieces: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def vocabulary_fields(
    files: Mapping[str, bytes],
    rows: int,
    bos_id: int | None,
    stop_ids: Sequence[int],
    source: str,
) -> dict[str, Any]:
    """The metadata of a tokenizer (its files by name) in a model with `rows` embeddings.

    bos_id and stop_ids are the model's (generation_config.json); the tokenizer's own are taken
    where it has none. Raises TokenizerError, beginning with `source`, for what llama.cpp lacks.
    """
    configured = _json(files, "tokenizer_config.json", source)
    described = _json(files, "tokenizer.json", source)
    if "tokenizer.model" in files:
        vocabulary = _of_sentencepiece(files["tokenizer.model"], source)
    elif described:
        vocabulary = _of_json(described, source)
    else:
        raise TokenizerError(
            f"{source}: has no tokenizer (tokenizer.model or tokenizer.json), and a GGUF file "
            "without one generates no text"
        )
    _add(vocabulary, _added(files, described, configured, source), rows, source)
    special = _special(vocabulary, configured, bos_id, stop_ids)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.token_type": vocabulary.kinds,
    }
    if vocabulary.scores is not None:
        fields["tokenizer.ggml.scores"] = vocabulary.scores
    if vocabulary.merges:
        fields["tokenizer.ggml.merges"] = vocabulary.merges
    extra = vocabulary.extra | special
    extra["add_bos_token"] = _adds(configured, described, vocabulary, special, "bos")
    extra["add_eos_token"] = _adds(configured, described, vocabulary, special, "eos")
    fields |= {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    return fields | _template_fields(files, configured)


def chat_templates(files: Mapping[str, bytes], configured: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, "default" the main one: chat_template.jinja's first."""
    stored = configured.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates |= {str(each["name"]): str(each["template"]) for each in stored}
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"].decode()
    return templates


def _template_fields(files: Mapping[str, bytes], configured: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    names = []
    for name, template in chat_templates(files, configured).items():
        if name == "default":
            fields["tokenizer.chat_template"] = template
            continue
        names.append(re.sub("[^A-Za-z0-9]", "_", name))
        fields[f"tokenizer.chat_template.{names[-1]}"] = template
    return fields | ({"tokenizer.chat_templates": names} if names else {})


def _json(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{source}: {name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{source}: {name}: must be a JSON object")
    return value


# ---- pieces added beside the vocabulary


def _added(
    files: Mapping[str, bytes],
    described: Mapping[str, Any],
    configured: Mapping[str, Any],
    source: str,
) -> dict[int, tuple[str, bool]]:
    """Id -> (piece, special) of added tokens, from every file that names them."""
    named = _json(files, "added_tokens.json", source)
    added = {int(number): (piece, False) for piece, number in named.items()}
    for each in described.get("added_tokens") or ():
        added[int(each["id"])] = str(each["content"]), bool(each.get("special"))
    for number, each in (configured.get("added_tokens_decoder") or {}).items():
        added[int(number)] = str(each["content"]), bool(each.get("special"))
    return added


def _add(
    vocabulary: _Vocabulary, added: Mapping[int, tuple[str, bool]], rows: int, source: str
) -> None:
    """Place added tokens, and fill up to the model's rows."""
    most = max([len(vocabulary.pieces) - 1, *added])
    if most >= rows:
        raise TokenizerError(
            f"{source}: the tokenizer has an id {most}, must be below {rows}, the rows of the "
            "model's embedding"
        )
    for number in range(len(vocabulary.pieces), rows):
        _place(vocabulary, number, f"[PAD{number}]", UNUSED, _UNUSED_SCORE)
    for number, (piece, special) in added.items():
        held = vocabulary.kinds[number]
        if held in (UNKNOWN, BYTE) and vocabulary.pieces[number] == piece:
            continue
        # Spaces of a piece that is matched in the text itself are spaces.
        text = piece if special else piece.replace(_SPACE, " ")
        _place(vocabulary, number, text, CONTROL if special else USER_DEFINED, _ADDED_SCORE)
    if len(set(vocabulary.pieces)) != len(vocabulary.pieces):
        seen: set[str] = set()
        twice = next(p for p in vocabulary.pieces if p in seen or seen.add(p))  # type: ignore[func-returns-value]
        raise TokenizerError(f"{source}: {twice!r} is the piece of two ids, which GGUF cannot hold")


def _place(vocabulary: _Vocabulary, number: int, piece: str, kind: int, score: float) -> None:
    for values, value in (
        (vocabulary.pieces, piece),
        (vocabulary.kinds, kind),
        (vocabulary.scores, score),
    ):
        if values is not None:
            values[number : number + 1] = [value]  # type: ignore[list-item]


def _special(
    vocabulary: _Vocabulary,
    configured: Mapping[str, Any],
    bos_id: int | None,
    stop_ids: Sequence[int],
) -> dict[str, int]:
    """Ids of special pieces by GGUF's key: the model's, else those that the tokenizer names."""
    number_of = {piece: number for number, piece in enumerate(vocabulary.pieces)}

    def named(key: str) -> int | None:
        value = configured.get(f"{key}_token")
        piece = value.get("content") if isinstance(value, dict) else value
        return number_of.get(str(piece))

    own = dict(vocabulary.extra.pop("special", {}))
    stops = [stop for stop in stop_ids if 0 <= stop < len(vocabulary.pieces)]
    eos = named("eos")
    if stops and eos not in stops:
        eos = stops[0]
    others = [stop for stop in stops if stop != eos]
    found = {
        "bos": bos_id if bos_id is not None and bos_id >= 0 else named("bos"),
        "eos": eos,
        "unknown": named("unk"),
        "padding": named("pad"),
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
    }
    found = {key: own.get(key) if value is None else value for key, value in found.items()}
    return {f"{key}_token_id": value for key, value in found.items() if value is not None}


def _adds(
    configured: Mapping[str, Any],
    described: Mapping[str, Any],
    vocabulary: _Vocabulary,
    special: Mapping[str, int],
    which: str,
) -> bool:
    """Whether the tokenizer puts its begin before a text, or its end behind it."""
    number = special.get(f"{which}_token_id")
    if number is None:
        return False
    stated = configured.get(f"add_{which}_token")
    if stated is not None:
        return bool(stated)
    if described:
        steps = list(_flat(described.get("post_processor"), "processors"))
        pieces = [piece for step in steps for piece in _template_pieces(step)]
        place = pieces[:1] if which == "bos" else pieces[-1:]
        return place == [vocabulary.pieces[number]]
    return which == "bos"


def _template_pieces(step: Mapping[str, Any]) -> list[str]:
    """The special pieces around one text, "" where the text stands."""
    if step.get("type") != "TemplateProcessing":
        return []
    return [str(part.get("SpecialToken", {}).get("id", "")) for part in step.get("single") or ()]


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
    steps = tuple(map(_step, _flat(described.get("pre_tokenizer"), "pretokenizers")))
    ignores = bool((described.get("model") or {}).get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((steps, ignores))
    if name is None:
        shown = ", ".join(" ".join(map(str, step)) for step in steps) or "none"
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise TokenizerError(
            f"{source}: tokenizer.json: pre_tokenizer: got {shown} (ignore_merges {ignores}), for "
            f"which llama.cpp has no name that is known here ({known})"
        )
    return name


def _step(step: Mapping[str, Any]) -> Step:
    """A pre-tokenizer as _PRE_TOKENIZERS has it; one with other settings equals none of these."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern") or {}
        return kind, pattern.get("Regex", pattern.get("String"))
    return kind, json.dumps(step, sort_keys=True)


def _flat(step: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a post-processor, without sequences."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for inner in step.get(key) or ():
        yield from _flat(inner, key)


# ---- tokenizer.model, a message of protocol buffers

_BPE = 2  # trainer_spec.model_type
_ONE_BYTE = {1: 8, 5: 4}  # of a wire type: bytes of its values


def _of_sentencepiece(model: bytes, source: str) -> _Vocabulary:
    label = f"{source}: tokenizer.model"
    pieces, kinds, scores = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _message(model, label):
        if number == 1:
            piece = dict(_message(value, label))
            pieces.append(piece.get(1, b"").decode())
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer |= dict(_message(value, label))
        elif number == 3:
            normalizer |= dict(_message(value, label))
    if trainer.get(3, 1) != _BPE:
        raise TokenizerError(
            f"{label}: is no byte-pair encoding (model_type {trainer.get(3, 1)}), and llama.cpp "
            "has no other for this architecture"
        )
    # Of trainer_spec: 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id.
    defaults = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
    special = {name: _signed(trainer.get(key, own)) for name, (key, own) in defaults.items()}
    extra: dict[str, Any] = {
        "pre": "default",
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        "special": {name: number for name, number in special.items() if number >= 0},
    }
    return _Vocabulary("llama", pieces, kinds, scores=scores, extra=extra)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _message(data: bytes, label: str) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: integers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, label)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at, label)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at, label)
        elif wire in _ONE_BYTE:
            length = _ONE_BYTE[wire]
        else:
            raise TokenizerError(f"{label}: damaged: no field has wire type {wire}")
        if at + length > len(data):
            raise TokenizerError(f"{label}: truncated")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, label: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise TokenizerError(f"{label}: truncated")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise TokenizerError(f"{label}: damaged: a number of more than 10 bytes")
