"""SIGINT and SIGTERM: training finishes its step and saves, anything else ends in a word."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A signal that comes again so soon is the same one: `timeout` sends it to a process and its group.
REPEAT_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises Terminated."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopping_on_signals(told: str = "") -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP (unless ignored, as nohup has it) ask to stop, which is what the
    yielded function tells; a second one interrupts. The first puts `told` on standard error."""
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
