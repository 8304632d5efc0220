"""What the commands share: their parser, types of arguments, exit codes, how a process ends."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tinyllama.errors import DataError, TinyllamaError, fit_for_terminal, reason
from tinyllama.system.signals import Terminated, reporting_lost_files, terminating

# An option less similar than this to what was typed is not suggested.
SIMILAR = 0.6


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, and whose --help keeps the lines of a description."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def print_help(self, file: Any = None) -> None:
        """argparse's own hides that a pipe is broken."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def check_names(self, words: Sequence[str]) -> None:
        """Exit with a message if a word is an option that this command does not have.

        argparse itself would first complain about what is missing, and suggest nothing.
        """
        names = self._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if not re.match(r"--?[A-Za-z]", word) or " " in word:
                continue
            if not any(known.startswith(name) for known in names):
                self.error(self.unknown_option(name, names))

    def unknown_option(self, name: str, names: Mapping[str, object]) -> str:
        """What to say about an option that does not exist: what it is called here, else the
        nearest option."""
        from tinyllama.cli import other_words
        from tinyllama.config import loader
        from tinyllama.config.options import nearest, similarity

        plain = name.replace("_", "-")
        known = other_words.WORDS.get(plain, plain)
        if known in names:
            return f"no option {name}: here it is called {known}"
        key = loader.meant_key(name.lstrip("-").replace("-", "_")) if "--set" in names else None
        if key is not None:
            return f"no option {name}: {key if ' ' in key else f'write --set {key}=VALUE'}"
        if " " in known and set(re.findall(r"--[a-z-]+", known)) <= set(names):
            return f"no option {name}: {known}"
        near = nearest(name, names)
        if similarity(name.lstrip("-"), near.lstrip("-")) < SIMILAR:
            return f"no option {name}"
        return f"no option {name}, the nearest is {near}"


def exit_code(run: Callable[[], int | None], name: str) -> int:
    """Run the command `name` and return its exit code: what it returned or 0, 2 for a mistake of
    the user, 130 interrupted, 143 terminated, 141 where nobody reads the output any more."""
    hook = sys.unraisablehook
    try:
        with terminating(), reporting_lost_files():
            return _completed(run)
    except TinyllamaError as error:
        code, message = 2, str(error)
    except BrokenPipeError:
        _discard(sys.stdout)
        return 141  # 128 + SIGPIPE, which Windows has not
    except OSError as error:
        code, message = 2, f"{error.filename or name}: {reason(error)}"
    except MemoryError as error:
        code, message = 2, f"{name}: out of memory: {reason(error)}"
    except Terminated as stopped:
        code, message = 128 + signal.SIGTERM, " ".join(["terminated", *map(str, stopped.args)])
    except KeyboardInterrupt as stopped:
        code, message = 128 + signal.SIGINT, " ".join(["interrupted", *map(str, stopped.args)])
    # Not before the exception is gone, and with it the progress bars that it held.
    sys.unraisablehook = hook
    with suppress(OSError):
        print(fit_for_terminal(message), file=sys.stderr)
    return code


def _completed(run: Callable[[], int | None]) -> int:
    """The exit code of a command that ended by itself, all its output written.

    Raises BrokenPipeError where the reader has gone: output that is buffered fails only here.
    """
    try:
        code = run() or 0
    except SystemExit as ended:  # argparse, after --help or a mistake
        code = int(ended.code or 0)
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)  # else Python tries again at exit, complains, and exits with 120
        raise
    return code


def _discard(stream: TextIO) -> None:
    """Let what is still written to a stream go nowhere."""
    with suppress(OSError, ValueError):  # a stream that is no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def leave(code: int) -> NoReturn:
    """End the process; after a signal at once, since Python would first wait for its threads, and
    for ever for one that a pool was just making when the signal came."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # its reader has gone
            _discard(stream)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        os._exit(code)
    sys.exit(code)


@contextmanager
def naming_text(source: object) -> Iterator[None]:
    """Raise DataError, which names the source, for text read in the block that is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text (0x{error.object[error.start]:02x})") from None


def path(word: str) -> Path:
    """An argument that names a file or folder; shells leave the `~` of --option=~/x to us."""
    return Path(os.path.expanduser(word))


def count(word: str) -> int:
    """An argument that must be an integer of 1 or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}, must be an integer of 1 or more")
    return int(word)


def seconds(word: str) -> float:
    """An argument that must be a time."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {word!r}, must be a number of seconds above 0")
    return number
