"""One row of JSON -> the text in it: {"text": "...", and any other keys}."""

import json
from collections.abc import Iterable

import msgspec

from tinyllama.errors import DataError
from tinyllama.system.json_files import short

_MOST_VALUES = 1_000_000  # that Python's reader makes objects of, 80 bytes each
_OTHER_ROWS = {"prompt", "completion", "messages", "instruction", "conversations"}


def other_rows_hint(names: Iterable[str]) -> str:
    """What to add to a message about a row without "text" whose keys or columns are `names`."""
    known = not _OTHER_ROWS.isdisjoint(names)
    return "; prompt/completion and messages rows are not supported yet" if known else ""


class _Row(msgspec.Struct):
    text: str


_DECODER = msgspec.json.Decoder(_Row)


def parse_row(data: bytes) -> str:
    """The row's "text". Raises DataError, whose message has no place yet."""
    try:
        return _DECODER.decode(data).text
    except (msgspec.DecodeError, RecursionError):
        return _parse_refused(data)


def _parse_refused(data: bytes) -> str:
    """A row that the fast decoder refused, for the message; or one that is read all the same, since
    Python's own writer puts NaN into other fields, which JSON does not have."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise DataError(f"not valid JSON, or more than {_MOST_VALUES} values in one row")
    try:
        row = json.loads(data)
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
    if not isinstance(row, dict):
        raise DataError(f'must be an object {{"text": ...}}, got {type(row).__name__}')
    if "text" not in row:
        keys = ", ".join(short(repr(key), 40) for key in list(row)[:8]) or "none"
        raise DataError(f'no "text"; keys found: {keys}{other_rows_hint(row)}')
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f'"text" must be a string, got {type(text).__name__}')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError('"text" holds half of a surrogate pair, which UTF-8 cannot encode')
    return text
