"""A map over processes that keeps the order, reads little ahead, and leaves no process behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tinyllama.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What this worker process applies to its items; set once, when the process starts.
_function: Callable[[Any], Any] | None = None


def ordered_map(
    build: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """build()(item) for each item, in their order, for any number of `workers`.

    One worker is this process itself. `build` and the items must pickle: processes are spawned,
    not forked, since a fork of one that runs threads or an accelerator may hang. At most
    2 * workers + 1 items are in progress. An error in a worker is raised here; DataError if a
    worker dies.
    """
    if workers == 1:
        yield from map(build(), items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(build,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_apply, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that read the text died: out of memory, or killed, or the script that"
            ' started it lacks `if __name__ == "__main__":`'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(build: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = build()


def _end_with_parent() -> None:
    """End this worker with its parent: one that is killed cannot end its workers itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
