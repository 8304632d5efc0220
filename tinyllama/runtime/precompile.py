"""Compiling C kernels on every core while the graph that uses them is still being built.

tinygrad compiles one kernel after another once a captured step is complete. Here clang starts as
soon as a piece of the step is known, and the object is put into the cache of compiled kernels
(kernel_cache.py), where tinygrad later finds it.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from tinygrad import TinyJit
from tinygrad.engine.realize import capturing

from tinyllama.runtime import fills, kernel_cache
from tinyllama.runtime.cpu import cpu_device

_started: dict[str, "Future[bytes] | None"] = {}


def start(sources: Iterable[str]) -> None:
    """Start to compile the sources that the cache lacks, if a step is being captured."""
    if not (capturing and isinstance(capturing[0], TinyJit)):
        return  # nothing will run: only the step's memory is planned (runtime/plan.py)
    for code in sources:
        if code not in _started:
            _started[code] = _compiled_later(code)


def _compiled_later(code: str) -> "Future[bytes] | None":
    compiler = cpu_device().compiler
    if kernel_cache.get(kernel_cache.key_of(compiler, code)) is not None:
        return None
    return _pool().submit(compiler.compile, code)


def waiting_for_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which builds a step to be captured, then waits for what it started: compilers,
    and threads that fill tensors."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        result = function(*args)
        fills.wait_for_fills()
        for code, future in _started.items():
            if future is not None:
                kernel_cache.put(kernel_cache.key_of(cpu_device().compiler, code), future.result())
                _started[code] = None
        return result

    return run


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # clang gets a lower priority than Python, so that Python finds all the sources soon.
    return ThreadPoolExecutor(os.cpu_count(), "clang", partial(fills.lower_priority, 5))
