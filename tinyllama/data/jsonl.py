"""One line of a JSON Lines file -> the text in it: {"text": "...", and any other keys}."""

import json

import msgspec

from tinyllama.errors import DataError

_OTHER_ROWS = {"prompt", "completion", "messages", "instruction", "conversations"}


class _Row(msgspec.Struct):
    text: str


_DECODER = msgspec.json.Decoder(_Row)


def parse_row(line: bytes) -> str:
    """The row's "text". Raises DataError, which says what is wrong but not where."""
    try:
        return _DECODER.decode(line).text
    except (msgspec.DecodeError, RecursionError):
        return _parse_refused(line)


def _parse_refused(line: bytes) -> str:
    """A row that the quick decoder refused: to say why, or because Python's own writer puts NaN
    into other fields, which JSON does not have."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}, column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise DataError("nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f'must be an object {{"text": ...}}, got {type(row).__name__}')
    if "text" not in row:
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        hint = "; prompt/completion and messages rows are not supported yet"
        raise DataError(f'no "text"; keys found: {found}{hint if _OTHER_ROWS & set(row) else ""}')
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f'"text" must be a string, got {type(text).__name__}')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError('"text" holds half of a surrogate pair, which UTF-8 cannot encode')
    return text
