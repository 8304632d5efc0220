"""SIGINT, SIGTERM and SIGHUP: training finishes its step and saves, every other command exits.

    terminating            a command: the first signal raises KeyboardInterrupt or Terminated
    stopping_on_signals    training: the first signal requests a stop, the second raises as above
    stopping_on_interrupt  a chat's answer: the first SIGINT stops it, and the command goes on
    reporting_lost_files   SIGBUS, of a mapped file that cannot be read, exits with one line

Python runs a signal handler between two of its own instructions, so a call into a driver holds it
up: OpenCL on a processor computes a large step for minutes within one call. A thread therefore
watches what the C level reports, and ends the process if Python does not. It saves nothing: what
was saved before is whole, since files appear under their names only when they are complete.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A signal that comes again so soon is the same one: `timeout` sends it to a process and its group.
REPEAT_SECONDS = 1.0
# What a process has to unwind after a signal that ends it, before the watching thread ends it.
GRACE_SECONDS = 3.0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT."""


# What `terminating` has raised. Python drops an exception that is raised within a destructor, so
# `stopping_on_signals` looks here before a run begins.
_raised: list[type[KeyboardInterrupt]] = []


class _Stop:
    """A stop that was requested of a run, and what to print about it."""

    def __init__(self, message: str, status: Callable[[], str]) -> None:
        self.status = status
        self._messages = [message]

    def announce(self) -> None:
        """Write the message once, from a handler or from the watching thread."""
        # print may be in progress in the main thread, and the reader may have been interrupted too.
        with suppress(IndexError, OSError):
            os.write(2, self._messages.pop().encode())


class _Watch:
    """The thread that ends the process, with exit code 130 or 143, where Python does not.

    Within `terminating`, after a signal whose handler has not run for GRACE_SECONDS; a second
    signal leaves the process that long in any case. Within `stopping_on_signals` the first one
    does not end it.
    """

    def __init__(self) -> None:
        self.stop: _Stop | None = None
        self.handled = 0  # signals whose handler has run
        self.ignores_interrupts = False  # which then end no process
        self._reader, self._writer = socket.socketpair()  # Windows takes no pipe here
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        """Stop watching; the thread ends."""
        signal.set_wakeup_fd(self._before)
        self._writer.close()

    def _run(self) -> None:
        first = 0.0  # when the first signal came
        is_second = False
        last, end = 0, float("inf")  # the signal that is to end the process, and when
        with self._reader:
            while True:
                number = self._next(end - time.monotonic())
                now = time.monotonic()
                if number == 0:
                    return
                if number is None:
                    if is_second or not self.handled:
                        self._end(last)
                    end = float("inf")
                elif number == signal.SIGINT and self.ignores_interrupts:
                    continue
                elif not first:
                    first, last = now, number
                    if self.stop is None:
                        end = now + GRACE_SECONDS
                    else:
                        self.stop.announce()
                elif now - first >= REPEAT_SECONDS and not is_second:
                    is_second, last, end = True, number, now + GRACE_SECONDS

    def _next(self, seconds: float) -> int | None:
        """The number of the next signal we handle; None after `seconds`, 0 once closed."""
        try:
            while True:
                self._reader.settimeout(None if seconds == float("inf") else max(seconds, 0.001))
                received = self._reader.recv(1)
                if not received or received[0] in _numbers():
                    return received[0] if received else 0
        except TimeoutError:
            return None

    def _end(self, number: int) -> None:
        status = self.stop.status() if self.stop else ""
        word = "interrupted" if number == signal.SIGINT else "terminated"
        with suppress(OSError):
            # Not through sys.stderr, which the main thread may hold. A terminal may show a bar.
            line = ("\n" if os.isatty(2) else "") + f"{word} {status}".rstrip() + "\n"
            os.write(2, line.encode())
        os._exit(128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))


_watch: _Watch | None = None


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises Terminated, and SIGINT, unless it is ignored, KeyboardInterrupt.

    From then on sys.unraisablehook is silent: the destructors of half-made objects would print
    errors that only the interruption causes.
    """
    global _watch

    def end(number: int, frame: FrameType | None) -> None:
        if _watch is not None:
            _watch.handled += 1
        _raised.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
        sys.unraisablehook = lambda _: None
        raise _raised[-1]

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    outer, _watch = _watch, _Watch()
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.close()
        _watch = outer
        _raised.clear()


@contextmanager
def stopping_on_signals(
    message: str = "", status: Callable[[], str] = str
) -> Iterator[Callable[[], int]]:
    """SIGINT, SIGTERM and SIGHUP request a stop; a second one raises KeyboardInterrupt or
    Terminated. A SIGHUP that is ignored, as under nohup, stays so.

    The yielded function returns 0, or once a stop is requested the exit code for it: 130 or 143.

    The first signal writes `message` to standard error. `status()` says how far the run has come,
    for the last line of a process that has to be ended within a call that does not return.
    """
    if _raised:
        raise _raised[0]
    stop = _Stop(message, status)
    received: list[float] = []  # when the first signal was handled
    code = 0

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal code
        if _watch is not None:
            _watch.handled += 1
        if received:
            if time.monotonic() - received[0] >= REPEAT_SECONDS:
                raise KeyboardInterrupt if number == signal.SIGINT else Terminated
            return
        received.append(time.monotonic())
        code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        stop.announce()

    numbers = [n for n in _numbers() if signal.getsignal(n) is not signal.SIG_IGN or n != _SIGHUP]
    before = {number: signal.signal(number, request) for number in numbers}
    if _watch is not None:
        _watch.stop = stop
    try:
        yield lambda: code
    finally:
        if _watch is not None:
            _watch.stop = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first SIGINT requests a stop of what this block does, a later one raises
    KeyboardInterrupt. The yielded function says whether a stop is requested.

    After the block SIGINT is what it was, as if none had come.
    """
    received: list[float] = []

    def request(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] >= REPEAT_SECONDS:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, request)
    if _watch is not None:
        _watch.ignores_interrupts = True
    try:
        yield lambda: bool(received)
    finally:
        if _watch is not None:
            _watch.ignores_interrupts = False
        signal.signal(signal.SIGINT, before)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """SIGINT does nothing, as for a program in which Ctrl-C is a key like others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_LOST = b"a file that is being read was shortened, or its disk fails (SIGBUS)\n"


@contextmanager
def reporting_lost_files() -> Iterator[None]:
    """SIGBUS writes one line and ends the process with exit code 2.

    Memory that a file is mapped to raises it where the file has become shorter, or cannot be read.
    The instruction that reads cannot go on, so a handler of Python's `signal`, which runs later,
    would never run: this one runs within the handler of C.
    """
    number = getattr(signal, "SIGBUS", None)
    if number is None:  # Windows
        yield
        return

    def end(number: int) -> None:
        os.write(2, _LOST)
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = install(number, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(number, before)


# Windows has no SIGHUP.
_SIGHUP = getattr(signal, "SIGHUP", None)


def _numbers() -> list[signal.Signals]:
    return [n for n in (signal.SIGINT, signal.SIGTERM, _SIGHUP) if n is not None]
