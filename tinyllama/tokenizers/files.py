"""The files of a tokenizer beside its vocabulary: what they say, and which travel with a model.

    tokenizer_config.json      names of begin and end, added tokens, settings, chat template
    special_tokens_map.json    names of special tokens
    added_tokens.json          text -> id of tokens beyond the vocabulary
    tokenizer.json             also has the added tokens
    chat_template.jinja        the chat template, before that of tokenizer_config.json
    generation_config.json     ids at which generation stops

Their formats are those of transformers, versions 4 and 5.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from tinyllama.errors import TokenizerError
from tinyllama.system.untrusted import open_regular, printable
from tinyllama.tokenizers.tokenizer import SpecialToken

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
TRAVELLING = (
    MODEL_FILE,
    JSON_FILE,
    CONFIG_FILE,
    _MAP_FILE,
    _ADDED_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
)
_MAX_BYTES = 64 << 20  # the largest real tokenizer.json has 35 MB
_MAX_SMALL_BYTES = 4 << 20  # of the other files; the largest real tokenizer_config.json has 1.2 MB
# Python makes objects of up to 150 bytes of them. A vocabulary of 262 thousand pieces with 514
# thousand merges has 2 million values and 300 thousand keys.
_MOST_VALUES, _MOST_KEYS = 3_000_000, 1_000_000
_SMALL = frozenset(TRAVELLING) - {MODEL_FILE, JSON_FILE}
_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the files say; None where they say nothing."""

    added: Mapping[int, SpecialToken]
    roles: Mapping[str, str]  # "bos" -> "<s>"
    special: frozenset[str]  # the texts of special tokens
    adds_bos: bool | None = None
    adds_eos: bool | None = None
    adds_space: bool | None = None
    legacy: bool | None = None
    chat_template: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that travel with its model. Raises TokenizerError."""
    found = {name: read_file(folder / name) for name in TRAVELLING if (folder / name).is_file()}
    if GENERATION_FILE not in found and (folder / "config.json").is_file():
        source = str(folder / "config.json")
        config = parse({"config.json": read_file(folder / "config.json")}, "config.json", source)
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        if any(value is not None for value in ids.values()):
            found[GENERATION_FILE] = to_json({k: v for k, v in ids.items() if v is not None})
    return found


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises TokenizerError."""
    if not os.path.lexists(path):
        raise TokenizerError(f"{path}: no such file")
    most = _MAX_BYTES if path.name not in _SMALL else _MAX_SMALL_BYTES
    with open_regular(path, TokenizerError) as (file, size):
        if size > most:
            raise TokenizerError(f"{path}: more than {most >> 20} MiB, which no tokenizer has")
        return file.read(size)  # which makes room for so many


def to_json(value: Json) -> bytes:
    """A file of JSON, its keys in the order that they have."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def to_compact_json(value: Json) -> bytes:
    """The same without spaces, for a vocabulary."""
    return msgspec.json.encode(value)


def read_settings(files: Mapping[str, bytes], source: str) -> Settings:
    """What the files say, all of them together. `source` names the folder in errors.

    Raises TokenizerError for a file that is no JSON or holds something else than transformers
    writes there.
    """
    config = parse(files, CONFIG_FILE, source)
    said = {key: value for key, value in config.items() if value is not None}
    named = parse(files, _MAP_FILE, source) | said
    roles = {
        role: text
        for role in _ROLES
        if (text := _text(named.get(f"{role}_token"), f"{role}_token", source)) is not None
    }
    listed = (_listed(named.get(key), key, source) for key in _LISTS)
    special = frozenset([*roles.values(), *(text for texts in listed for text in texts)])
    added: dict[int, SpecialToken] = {}
    for token in _added(files, config, source):
        is_special = token.special or token.content in special
        added[token.id] = replace(token, special=is_special)
    bos_id, eos_ids = _generation_ids(parse(files, GENERATION_FILE, source), source)
    return Settings(
        added=dict(sorted(added.items())),
        roles=roles,
        special=special,
        adds_bos=_flag(config, "add_bos_token", source),
        adds_eos=_flag(config, "add_eos_token", source),
        adds_space=_flag(config, "add_prefix_space", source),
        legacy=_flag(config, "legacy", source),
        chat_template=_template(files, config, source),
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def decode_json(data: bytes, source: str, kind: Any = Any) -> Any:
    """JSON as values, or as the msgspec type `kind`. Raises TokenizerError, naming the file."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES or data.count(b":") > _MOST_KEYS:
        raise TokenizerError(f"{source}: damaged: more values than any tokenizer has")
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        damaged = "" if isinstance(error, msgspec.ValidationError) else "not JSON, so damaged: "
        raise TokenizerError(f"{source}: {damaged}{printable(error)}") from None


class _WithAdded(msgspec.Struct):
    """What is read of a tokenizer.json here; its vocabulary is not."""

    added_tokens: list[dict[str, Any]] | None = None


def parse(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is no such file."""
    if name not in files:
        return {}
    value = decode_json(files[name], f"{source}: {name}")
    if not isinstance(value, dict):
        raise TokenizerError(f"{source}: {name}: must be a JSON object")
    return value


def _added(files: Mapping[str, bytes], config: Json, source: str) -> Iterator[SpecialToken]:
    """Every added token, the most telling file last."""
    for text, number in parse(files, _ADDED_FILE, source).items():
        yield SpecialToken(text, _id(number, text, source), special=False, normalized=True)
    if JSON_FILE in files:
        read = decode_json(files[JSON_FILE], f"{source}: {JSON_FILE}", _WithAdded)
        for entry in read.added_tokens or ():
            yield _token(entry, entry.get("id"), source)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{source}: {CONFIG_FILE}: added_tokens_decoder: must be an object")
    for number, entry in decoder.items():
        yield _token(entry, int(number) if number.isdecimal() else number, source)


def _token(entry: Any, number: Any, source: str) -> SpecialToken:
    text = _text(entry, "an added token", source)
    if not text:
        raise TokenizerError(f"{source}: an added token has no text: {printable(repr(entry))}")
    flags = {key: bool(entry.get(key, False)) for key in _FLAGS} if isinstance(entry, dict) else {}
    return SpecialToken(text, _id(number, text, source), **flags)


def _id(number: Any, text: str, source: str) -> int:
    if not _is_id(number):
        raise TokenizerError(
            f"{source}: the added token {printable(repr(text))}: id {printable(repr(number))}: must"
            " be 0 or more"
        )
    return number


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _text(value: Any, what: str, source: str) -> str | None:
    """The text of a token: a string or an object with `content`; null is none."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"{source}: {what}: got {printable(repr(value))}, must be a text")
    return text or None


def _listed(value: Any, key: str, source: str) -> list[str]:
    entries = list(value.values()) if isinstance(value, dict) else value or []
    if not isinstance(entries, list):
        got = printable(repr(value))
        raise TokenizerError(f"{source}: {key}: got {got}, must be a list of texts")
    return [text for entry in entries if (text := _text(entry, key, source))]


def _flag(config: Json, key: str, source: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        got = printable(repr(value))
        raise TokenizerError(f"{source}: {CONFIG_FILE}: {key}: got {got}, must be true or false")
    return value


def _template(files: Mapping[str, bytes], config: Json, source: str) -> str | None:
    """The template of that name, or of several the one named "default"."""
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError:
            raise TokenizerError(f"{source}: {TEMPLATE_FILE}: is not UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry for entry in value if isinstance(entry, dict)}
        value = named.get("default", {}).get("template")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{source}: {CONFIG_FILE}: chat_template: must be a text")
    return value


def _generation_ids(values: Json, source: str) -> tuple[int | None, tuple[int, ...]]:
    """(begin, ends) of generation_config.json; negative ids stand for none."""
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for value in [*ends, *([] if bos is None else [bos])]:
        if type(value) is not int:
            raise TokenizerError(
                f"{source}: {GENERATION_FILE}: bos_token_id {printable(repr(bos))}, eos_token_id "
                f"{printable(repr(eos))}: must be integers"
            )
    return bos if _is_id(bos) else None, tuple(dict.fromkeys(end for end in ends if end >= 0))
