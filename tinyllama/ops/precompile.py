"""Compiling C kernels on every core while the graph that uses them is still being built.

tinygrad compiles one kernel after another, when a captured step is complete. Here clang starts as
soon as a kernel is first mentioned, and its object is put into tinygrad's own compile cache, where
tinygrad then finds it.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tinygrad import TinyJit
from tinygrad.device import Device
from tinygrad.engine.realize import capturing
from tinygrad.helpers import Context, diskcache_get, diskcache_put

from tinyllama.ops import storage

_started: dict[str, "Future[bytes] | None"] = {}


def start(code: str) -> None:
    """Begin to compile a kernel's source, if a step is being captured and the cache lacks it."""
    if not (capturing and isinstance(capturing[0], TinyJit)) or code in _started:
        return  # nothing is captured, or only to plan its memory (ops/plan.py)
    with Context(ALLOW_DEVICE_USAGE=1):
        compiler: Any = Device["CPU"].compiler
    if compiler.cachekey is None:
        return
    known = diskcache_get(compiler.cachekey, code) is not None
    _started[code] = None if known else _pool().submit(compiler.compile, code)


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which builds a step, with all that it started done when it returns:
    compilations, and the tensors that are still being filled."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        result = function(*args)
        storage.settle()
        for code, future in _started.items():
            if future is not None:
                diskcache_put(Device["CPU"].compiler.cachekey, code, future.result())
                _started[code] = None
        return result

    return run


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="clang")
