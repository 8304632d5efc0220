"""What every command line here shares: types of arguments, exit codes, how it ends in a word."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tinyllama.errors import TinyllamaError, reason
from tinyllama.system.signals import Terminated, terminating


def exit_code(run: Callable[[], int | None], name: str) -> int:
    """Run the command `name`; the exit code: what it returns or 0, 2 for the user's mistake, 130
    interrupted, 143 terminated, 141 where nobody reads its output any more."""
    hook = sys.unraisablehook
    try:
        with terminating():
            return run() or 0
    except TinyllamaError as error:
        code, told = 2, str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        code, told = 2, f"{error.filename or name}: {error.strerror or error}"
    except MemoryError as error:
        code, told = 2, f"{name}: out of memory: {reason(error)}"
    except Terminated as stopped:
        code, told = 128 + signal.SIGTERM, " ".join(["terminated", *map(str, stopped.args)])
    except KeyboardInterrupt as stopped:
        code, told = 128 + signal.SIGINT, " ".join(["interrupted", *map(str, stopped.args)])
    # Not before the exception is gone, and with it the progress bars that it held.
    sys.unraisablehook = hook
    print(told, file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """End the process; after a signal at once, since Python would first wait for its threads, and
    for ever for one that a pool was just making when the signal came."""
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


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
        found = float(word)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"got {word!r}, must be a number of seconds above 0")
    return found
