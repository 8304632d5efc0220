"""Every mistake a user can make, as one small tree; anything else that escapes is our bug.

    TinyllamaError            the command line prints str(error) on one line and exits with 2
    |-- ConfigError           a configuration file, an override, a size that does not fit
    |-- DeviceError           a device that is absent or cannot do what is needed
    |-- DataError             text files: missing, empty, undecodable, too short
    |-- TokenizerError        a tokenizer file that is missing, damaged or of the wrong kind
    |-- CheckpointError       a checkpoint folder that is missing, incomplete or damaged
    |-- WeightsError          tensors that are missing, extra, misshapen or of an unknown type
    `-- TrainingError         a run that cannot go on, such as a loss that is no longer finite

A message names the file (or the override), what it holds and what is allowed.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

MOST_LINES = 24  # of a message
_FIRST_LINES = 20
MOST_CHARACTERS = 2000  # of a line
_LAST_CHARACTERS = 400


def fit_for_terminal(text: str) -> str:
    """Text with what a terminal acts on spelled out, line ends aside: names of files and values in
    them may hold escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shortened(text: str) -> str:
    """Of a text with many lines, a screenful: the first ones, how many more, and the last one,
    which often says what to do. Of a long line, its beginning and its end."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        left_out = len(lines) - _FIRST_LINES - 1
        lines = [*lines[:_FIRST_LINES], f"... and {left_out} more lines", lines[-1]]
    return "\n".join(map(_shortened_line, lines))


def _shortened_line(line: str) -> str:
    if len(line) <= MOST_CHARACTERS:
        return line
    return f"{line[: MOST_CHARACTERS - _LAST_CHARACTERS - 5]} ... {line[-_LAST_CHARACTERS:]}"


class TinyllamaError(Exception):
    """What a user can put right; `str(error)` is the message, fit for a terminal."""

    def __init__(self, message: object = "") -> None:
        super().__init__(fit_for_terminal(shortened(str(message))))


class ConfigError(TinyllamaError):
    """A configuration that cannot be read or holds a value that is not allowed."""


class DeviceError(TinyllamaError):
    """A device that is absent, or that cannot do what is needed."""


class DataError(TinyllamaError):
    """Training or evaluation text that is missing, empty, undecodable or too short."""


class TokenizerError(TinyllamaError):
    """A tokenizer file that is missing, damaged or of a kind that is not supported."""


class CheckpointError(TinyllamaError):
    """A checkpoint folder that is missing, incomplete or damaged."""


class WeightsError(TinyllamaError):
    """Tensors that are missing, extra, of the wrong shape or of an unknown type."""


class TrainingError(TinyllamaError):
    """A run that cannot go on, such as a loss that is no longer finite."""


@contextmanager
def naming(what: str, kind: type[TinyllamaError] = TinyllamaError) -> Iterator[None]:
    """Put `what` (an option) before the message of an error of that kind raised in the block."""
    try:
        yield
    except kind as error:
        raise type(error)(f"{what}: {error}") from error


# The system's words, in ours.
_REASONS = {
    errno.ENOENT: "No such file or folder",
    errno.ENOTDIR: "Not a folder",
    errno.EISDIR: "Is a folder, not a file",
    errno.ELOOP: "Is a link, which is not followed here",
    errno.ENOTEMPTY: "The folder is not empty",
}


def reason(error: MemoryError | OSError) -> str:
    """What the system says about an error, or words for an error that says nothing."""
    if isinstance(error, MemoryError):
        return str(error) or "the system has no more"
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def missing(error: ImportError) -> str:
    """The package that is not installed."""
    return (error.name or str(error)).partition(".")[0]
