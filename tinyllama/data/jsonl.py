"""One row of JSON: {"text": "...", and any other keys}, or an object of another kind."""

import json
from typing import Any

import msgspec

from tinyllama.data.conversations import every_kind, expected, kind_of
from tinyllama.errors import DataError
from tinyllama.system.untrusted import printable

_MOST_VALUES = 1_000_000  # that Python's reader makes objects of, 80 bytes each


class _Row(msgspec.Struct):
    text: str


_DECODER = msgspec.json.Decoder(_Row)


def parse_row(data: bytes) -> str:
    """The row's "text". Raises DataError, whose message has no place yet."""
    try:
        return _DECODER.decode(data).text
    except (msgspec.DecodeError, RecursionError):
        return _text_of(_parse_refused(data))


def parse_object(data: bytes) -> Any:
    """The value of a row. Raises DataError, whose message has no place yet."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise DataError(f"more than {_MOST_VALUES} values in one row")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        value = _parse_refused(data)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("holds half of a surrogate pair, which UTF-8 cannot encode") from None
    return value


def _parse_refused(data: bytes) -> Any:
    """A row that the fast decoder refused, for the message; or one that is read all the same, since
    Python's own writer puts NaN into other fields, which JSON does not have."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise DataError(f"not valid JSON, or more than {_MOST_VALUES} values in one row")
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno} of the row, "
        hint = ""
        if data.strip() in (b"{", b"["):
            hint = "; put each row on a line of its own, or all of them into one array of objects"
        raise DataError(f"not valid JSON: {error.msg}, {line}column {error.colno}{hint}") from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise DataError("nested too deeply") from None


def _text_of(row: Any) -> str:
    if not isinstance(row, dict):
        raise DataError(f'must be an object {{"text": ...}}, got {type(row).__name__}')
    if "text" not in row:
        keys = ", ".join(printable(repr(key), 40) for key in list(row)[:8]) or "none"
        raise DataError(f'no "text"; keys found: {keys}{_of_another_kind(row)}')
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f'"text" must be a string, got {type(text).__name__}')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError('"text" holds half of a surrogate pair, which UTF-8 cannot encode')
    return text


def _of_another_kind(row: dict[str, Any]) -> str:
    kind = kind_of(row)
    if kind is None:
        return f"; {every_kind()}"
    return (
        f'; the file begins with rows that have "text": rows with {expected(kind)} belong into a '
        "file of their own"
    )
