"""Small JSON files of ours, checked against the type that they must have before they are used.

Nobody needs to trust them: size, depth and every value are bounded, and messages are short whatever
the file holds.
"""

from pathlib import Path
from typing import TypeVar

import msgspec

from tinyllama.errors import TinyllamaError, reason
from tinyllama.system.files import read_file

MOST_BYTES = 16 << 20

T = TypeVar("T")


def read_json_file(
    path: Path, kind: type[T], wrong: type[TinyllamaError], most_bytes: int = MOST_BYTES
) -> T:
    """The contents of a JSON file as a `kind`, such as a msgspec Struct; raises `wrong`, which
    names the file and, for a value of another kind, its place in it."""
    try:
        return parse_json(read_file(path, most_bytes), kind, wrong, str(path))
    except FileNotFoundError:
        raise wrong(f"{path}: missing") from None
    except OSError as error:
        raise wrong(f"{path}: cannot be read: {reason(error)}") from error


def parse_json(data: bytes, kind: type[T], wrong: type[TinyllamaError], source: str) -> T:
    """JSON text as a `kind`; raises `wrong`, which begins with `source`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        what = short(str(error))
        if data.lstrip()[:1] != b"{" and "`$" not in what:
            raise wrong(f"{source}: must be a JSON object") from None
        raise wrong(f"{source}: {what[:1].lower()}{what[1:]}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = short(str(error))
        raise wrong(f"{source}: not JSON, so it is damaged or truncated: {what}") from None


def short(text: str, most: int = 200) -> str:
    """Text from a file, fit for a message: of bounded length, without line ends and without the
    characters that a terminal acts on."""
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)
