"""SIGINT and SIGTERM: training finishes its step and saves, anything else ends in a word."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A signal that comes again so soon is the same one: `timeout` sends it to a process and its group.
REPEAT_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


# What `terminating` has raised. Python drops an exception that a destructor meets, so a run that
# would begin all the same looks here.
_raised: list[type[KeyboardInterrupt]] = []


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises Terminated, and SIGINT, unless it is ignored, KeyboardInterrupt.

    From then on sys.unraisablehook is silent: objects that were half made have no more to say.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _raised.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
        sys.unraisablehook = lambda _: None
        raise _raised[-1]

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _raised.clear()


@contextmanager
def stopping_on_signals(told: str = "") -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP (unless ignored, as nohup has it) ask to stop, which is what the
    yielded function tells; a second one interrupts. The first puts `told` on standard error."""
    if _raised:
        raise _raised[0]
    asked: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            if time.monotonic() - asked[0] >= REPEAT_SECONDS:
                raise KeyboardInterrupt if number == signal.SIGINT else Terminated
            return
        asked.append(time.monotonic())
        with suppress(OSError):  # who reads it may have been interrupted too
            os.write(2, told.encode())  # print may be under way here

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
