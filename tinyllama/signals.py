"""SIGINT and SIGTERM: training finishes its step and saves, anything else ends in a word."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
    """SIGINT and SIGTERM ask to stop, which is what the yielded function tells; a second one
    interrupts. The first puts `told` on standard error."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, told.encode())  # print may be under way here

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
