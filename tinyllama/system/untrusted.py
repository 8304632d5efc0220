"""Files that nobody vouches for: opened, read, checked and described without trusting them.

Only regular files are opened (a FIFO would block, a device has no end), documents have a largest
size, values have the types that they must have, and messages stay short and printable whatever the
file holds. Models and adapters of others are read with this, and our own small JSON files too.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from tinyllama.errors import ConfigError, TinyllamaError, reason
from tinyllama.system import files

T = TypeVar("T")

MOST_BYTES = 16 << 20  # of a JSON file of ours
# A config.json has some kilobytes; parsed JSON takes up to 30 times its bytes.
MAX_JSON_BYTES = 1 << 20
_SHOWN_PROBLEMS = 20

_LFS = b"version https://git-lfs"
# How files begin that people have in place of another one.
_BEGINNINGS = {
    _LFS: "a Git LFS pointer, not the file itself: type git lfs pull, or download it",
    b"<!doctype html": "a page of HTML, not the file itself: the download did not succeed",
    b"<html": "a page of HTML, not the file itself: the download did not succeed",
    b"gguf": "a GGUF file: name it with its ending .gguf",
    b"pk\x03\x04": "a zip archive, as torch.save writes it: a pickle, which is never read",
    b"\x80\x02": "a pickle, which can run code and is never read",
    b"\x80\x04": "a pickle, which can run code and is never read",
}


def printable(text: object, most: int = 120) -> str:
    """Text from a file, fit for a message: of bounded length, without line ends and without the
    characters that a terminal acts on."""
    whole = str(text)
    if len(whole) <= most and whole.isprintable():
        return whole
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in whole[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def some_of(problems: Iterable[str], source: object) -> str:
    """A message of one line per problem, each after `source`; of many, the first."""
    lines = sorted(problems)
    shown = [f"{source}: {line}" for line in lines[:_SHOWN_PROBLEMS]]
    if len(lines) > _SHOWN_PROBLEMS:
        shown.append(f"{source}: and {len(lines) - _SHOWN_PROBLEMS} more")
    return "\n".join(shown)


def what_it_is(start: bytes) -> str | None:
    """What a file is that begins with these bytes, where people have it by mistake."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), None)


@contextmanager
def open_regular(
    path: str | os.PathLike[str], wrong: type[TinyllamaError]
) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, and its size in bytes; links are followed.

    Raises `wrong` for one that is absent, cannot be read or is of another kind.
    """
    label = printable(os.fspath(path), 400)
    try:
        opened = files.open_regular(path)
    except FileNotFoundError:
        raise wrong(f"{label}: missing") from None
    except files.NotRegularError:
        raise wrong(f"{label}: is no regular file") from None
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise wrong(f"{label}: cannot be read: {why}") from error
    with opened as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except OSError as error:
            raise wrong(f"{label}: cannot be read: {reason(error)}") from error


def read_small(
    path: str | os.PathLike[str], wrong: type[TinyllamaError], most: int = MAX_JSON_BYTES
) -> bytes:
    """All bytes of a file, which must not be larger than `most`."""
    with open_regular(path, wrong) as (file, size):
        start = file.read(64)
        if what := what_it_is(start):
            raise wrong(f"{path}: is {what}")
        if size > most:
            raise wrong(f"{path}: {size} bytes, at most {most} are allowed")
        return start + file.read(max(0, size - len(start)))  # read makes room for so many


def read_json(
    path: Path, wrong: type[TinyllamaError] = ConfigError, most: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """A JSON object from a file; raises `wrong`, naming the file."""
    data = read_small(path, wrong, most)
    try:
        value = json.loads(data)
        if b"\\u" in data:  # may spell half a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise wrong(
            f"{path}: not JSON, so it is damaged or truncated: {printable(error)}"
        ) from error
    if not isinstance(value, dict):
        raise wrong(f"{path}: must be a JSON object")
    return value


def read_json_file(
    path: Path, kind: type[T], wrong: type[TinyllamaError], most: int = MOST_BYTES
) -> T:
    """The contents of a JSON file as a `kind`, such as a msgspec Struct; raises `wrong`, which
    names the file and, for a value of another kind, its place in it."""
    return parse_json(read_small(path, wrong, most), kind, wrong, str(path))


def parse_json(data: bytes, kind: type[T], wrong: type[TinyllamaError], source: str) -> T:
    """JSON text as a `kind`; raises `wrong`, which begins with `source`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        if data.lstrip()[:1] != b"{" and "`$" not in str(error):
            raise wrong(f"{source}: must be a JSON object") from None
        raise wrong(f"{source}: {place_first(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = printable(error)
        raise wrong(f"{source}: not JSON, so it is damaged or truncated: {what}") from None


def typed(
    values: object, form: type[T], source: object, wrong: type[TinyllamaError] = ConfigError
) -> T:
    """Parsed JSON as a msgspec Struct; raises `wrong`, naming the place and what must be there."""
    try:
        return msgspec.convert(values, form)
    except (msgspec.ValidationError, RecursionError) as error:
        raise wrong(f"{source}: {place_first(error)}") from error


def place_first(error: Exception) -> str:
    """msgspec's message with the place first: `shape[0]: expected an integer, got a string`."""
    words, _, place = str(error).partition(" - at `$")
    place = place.removesuffix("`").removeprefix(".")
    text = f"{words[:1].lower()}{words[1:]}".replace("`", "")
    return printable(f"{place}: {text}" if place else text)


def shown_shape(shape: Sequence[int]) -> str:
    """A shape for a message."""
    return printable(tuple(shape[:16]) if len(shape) <= 16 else f"of {len(shape)} sizes")
