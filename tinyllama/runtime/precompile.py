"""Compiling kernels on every core while the graph that uses them is still being built.

tinygrad compiles one kernel after another once a captured step is complete. Here compilers start as
soon as a piece of the step is known, and what they make is put into the cache of compiled kernels
(kernel_cache.py), where tinygrad later finds it. On a GPU this includes the kernels that tinygrad
writes itself: their texts are made first, which takes Python as long as it would later.

clang runs as a process, NVRTC lets other threads run. Other compilers are left to tinygrad.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from tinygrad import TinyJit
from tinygrad.codegen import do_to_program
from tinygrad.device import Compiler, Device
from tinygrad.engine.realize import capturing
from tinygrad.helpers import BEAM
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import fills, kernel_cache
from tinyllama.runtime.cpu import cpu_device
from tinyllama.runtime.patches.cubin import CubinCompiler

# Called with how many kernels are compiled, and of how many, while a run waits for a GPU's.
Notice = Callable[[int, int], None]

_started: dict[tuple[str, str], "Future[bytes] | None"] = {}  # by device and text
_notices: list[Notice] = []


def show_waiting(notice: Notice) -> None:
    """From here on, call `notice` while a captured step waits for compilers of a GPU."""
    _notices[:] = [notice]


def is_capturing() -> bool:
    """Whether a step is being captured that will run, and not only planned (runtime/plan.py)."""
    return bool(capturing) and isinstance(capturing[0], TinyJit)


def start(kernels: UOp) -> UOp:
    """Start to compile the kernels (LINEAR) that the cache lacks; returns them with their texts."""
    kernels = kernels.replace(src=tuple(map(_with_text, kernels.src)))
    for device, text in dict.fromkeys(_texts(kernels)):
        if (device, text) not in _started:
            _started[device, text] = _compiled_later(device, text)
    return kernels


def wait() -> None:
    """Wait for all that was started."""
    pending = {future: key for key, future in _started.items() if future is not None}
    on_gpu = any(device != "CPU" for device, _ in pending.values())
    for done, future in enumerate(as_completed(pending), 1):
        device, text = pending[future]
        kernel_cache.put(kernel_cache.key_of(_compiler(device), text), future.result())
        _started[device, text] = None
        for notice in _notices if on_gpu else ():
            notice(done, len(pending))


def waiting_for_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which builds a step to be captured, then waits for what it started: compilers,
    and threads that fill tensors."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        result = function(*args)
        fills.wait_for_fills()
        wait()
        return result

    return run


def _with_text(call: UOp) -> UOp:
    """A kernel's call in which one that tinygrad writes for a GPU has its text."""
    sink = call.src[0]
    if sink.op is not Ops.SINK or BEAM or not isinstance(call.device, str):
        return call
    if not _threads_may_compile(call.device) or call.device == "CPU":
        return call
    return call.replace(src=(program(call.device, sink), *call.src[1:]))


_programs: dict[tuple[str, bytes], UOp] = {}


def program(device: str, sink: UOp) -> UOp:
    """tinygrad's PROGRAM of a kernel that it writes itself (SINK), up to its text."""
    key = device, sink.key
    if key not in _programs:
        renderer = copy.copy(Device[device].renderer)
        renderer.compiler = Compiler()  # which returns the text
        whole = do_to_program(sink, renderer)
        _programs[key] = whole.replace(src=whole.src[:4])
    return _programs[key]


def _texts(kernels: UOp) -> Iterable[tuple[str, str]]:
    """Device and text of each kernel that has a text and is not compiled."""
    for call in kernels.src:
        kernel = call.src[0]
        if kernel.op is Ops.PROGRAM and len(kernel.src) == 4:
            device, text = kernel.src[1].arg, kernel.src[3].arg
            if _threads_may_compile(device):
                yield device, text


@functools.cache
def _threads_may_compile(device: str) -> bool:
    return device == "CPU" or isinstance(_compiler(device), CubinCompiler)


def _compiler(device: str) -> Any:
    return cpu_device().compiler if device == "CPU" else Device[device].renderer.compiler


def _compiled_later(device: str, text: str) -> "Future[bytes] | None":
    compiler = _compiler(device)
    if kernel_cache.get(kernel_cache.key_of(compiler, text)) is not None:
        return None
    return pool().submit(compiler.compile, text)


@functools.cache
def pool() -> ThreadPoolExecutor:
    """The threads that compile."""
    # Compilers get a lower priority than Python, so that Python finds all the texts soon.
    return ThreadPoolExecutor(os.cpu_count(), "compiler", partial(fills.lower_priority, 5))
