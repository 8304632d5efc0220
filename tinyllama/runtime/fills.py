"""Threads that write tensors' memory while Python builds the step's graph.

`submit` gives one of them something to write (a model's weights); `touch` has zeroed memory
written to once per page, so that the system gives it out before the first step needs it.
`finish_background_writes` ends both.
"""

import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

_WRITER = "writer"
# Bytes that `touch` writes to before it looks again whether it should stop.
TOUCH_BYTES = 16 << 20

_pending: list[Future[None]] = []
_touching: list[threading.Thread] = []
_stop_touching = threading.Event()


def submit(fill: Callable[[], None]) -> None:
    """Run `fill`, which writes tensors' memory, on another thread, after those submitted before."""
    _pending.append(_writer().submit(fill))


def wait_for_fills() -> None:
    """Wait until everything submitted is written; an error in it is raised here."""
    while _pending:
        _pending.pop(0).result()


def finish_background_writes() -> None:
    """Wait as `wait_for_fills` does, and stop `touch`: after this, any tensor may be written."""
    if threading.current_thread().name.startswith(_WRITER):
        return  # the thread that others wait for
    wait_for_fills()
    _stop_touching.set()
    while _touching:
        _touching.pop().join()
    _stop_touching.clear()


def touch(memories: Sequence[npt.NDArray[Any]]) -> None:
    """Write a zero to each page of `memories` (bytes that are all zero) on another thread.

    The system gives out a page when it is first written to, which takes 0.1 to 4 s per GB: better
    while a core has nothing else to do than in the first step.
    """
    thread = threading.Thread(target=_touch, args=[memories], daemon=True)
    thread.start()
    _touching.append(thread)


def _touch(memories: Sequence[npt.NDArray[Any]]) -> None:
    lower_priority(15)  # everything else comes first
    for memory in memories:
        for start in range(0, len(memory), TOUCH_BYTES):
            if _stop_touching.is_set():
                return
            memory[start : start + TOUCH_BYTES : mmap.PAGESIZE] = 0


@functools.cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=_WRITER)


def lower_priority(niceness: int) -> None:
    """Let other threads run before this one and the processes it starts, on Linux."""
    if sys.platform == "linux":  # elsewhere this would slow down the whole process
        os.nice(niceness)
