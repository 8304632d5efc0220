"""Moving numbers between numpy and a tensor's own memory, without a graph."""

import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer, Device

from tinyllama.runtime.memory import allocate_zeros, use_huge_pages

_WRITER = "writer"
NumpyArray = npt.NDArray[Any]


# What `begin_zero` writes to between two looks at whether somebody waits.
TOUCH_BYTES = 16 << 20

_pending: list[Future[None]] = []
_touching: list[threading.Thread] = []
_enough = threading.Event()


def later(fill: Callable[[], None], tensors: Iterable[Tensor]) -> None:
    """Run `fill`, which writes `tensors`, on another thread, while the step's graph is built.

    `settle` waits for it; reading or writing a tensor here and running a captured step do so.
    The tensors get their memory here: while tinygrad generates code, no thread may ask for any.
    """
    for tensor in tensors:
        buffer_of(tensor)
    _pending.append(_writer().submit(fill))


def wait_for_fills() -> None:
    """Wait until everything given to `later` is written; an error in it is raised here."""
    while _pending:
        _pending.pop(0).result()


def settle() -> None:
    """Wait as `wait_for_fills`, and end what `begin_zero` began: now all tensors may be written."""
    if threading.current_thread().name.startswith(_WRITER):
        return  # the writer itself
    wait_for_fills()
    _enough.set()
    while _touching:
        _touching.pop().join()
    _enough.clear()


@functools.cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=_WRITER)


def stand_back(niceness: int) -> None:
    """Let other threads go before this one and the processes it starts, where that can be."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(niceness)


def buffer_of(tensor: Tensor) -> Buffer:
    """The memory behind a tensor that is a whole buffer, allocated now if it was not."""
    if tensor.device == "CPU":
        use_huge_pages()
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "tensor is spread over several devices"
    return buffer.ensure_allocated()


class Inputs:
    """The tensors that a captured step is called with: the same ones, filled anew each time.

    A new tensor of an array's numbers takes tinygrad milliseconds, which small models have not.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}

    def __call__(self, *arrays: NumpyArray) -> list[Tensor]:
        """Tensors of the arrays' numbers, until the next call with arrays of the same shapes.

        What was called with them before has run when they are filled.
        """
        filled = []
        for place, array in enumerate(arrays):
            key = place, array.shape, array.dtype, Device.DEFAULT
            if key not in self._tensors:
                self._tensors[key] = Tensor.empty(*array.shape, dtype=array.dtype.name)
            write_new(self._tensors[key], array)
            filled.append(self._tensors[key])
        return filled


def write(tensor: Tensor, array: NumpyArray) -> None:
    """Overwrite a tensor by an array of its shape and item size (bfloat16 as uint16), in place."""
    settle()
    write_new(tensor, array)


def write_new(tensor: Tensor, array: NumpyArray) -> None:
    """As `write`, for a tensor that nothing given to `later` touches: waits for nothing."""
    assert array.shape == tensor.shape and array.itemsize == tensor.dtype.itemsize
    if tensor.device == "CPU":
        _memory(tensor)[...] = array
        return
    values = np.require(array, requirements=["C", "W"])  # tinygrad asks for writable memory
    buffer_of(tensor).copyin(memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def fill_zero(tensor: Tensor) -> None:
    """Overwrite a tensor by zeros, in place; on the CPU what has no memory yet gets new memory."""
    settle()
    _fill_zero(tensor)


def _fill_zero(tensor: Tensor) -> None:
    if tensor.device != "CPU":
        write_new(tensor, np.zeros(tensor.shape, _numpy_type(tensor)))
        return
    use_huge_pages()
    buffer = tensor.uop.base.buffer
    if not (isinstance(buffer, Buffer) and allocate_zeros(buffer)):
        _memory(tensor)[...] = 0


def begin_zero(tensors: Iterable[Tensor]) -> None:
    """Zeros for new tensors, which nothing has used yet; not waited for, nor does it wait.

    On the CPU another thread writes to each of their pages until `settle` is called. The system
    gives a page out when it is first written to, which takes 0.1 to 4 s a GB: time that a core had
    better spend while Python builds the step than in the first step.
    """
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.device == "CPU":
            _fill_zero(tensor)
    later(functools.partial(_write_zeros, tensors), tensors)


def _write_zeros(tensors: Iterable[Tensor]) -> None:
    memories = []
    for tensor in tensors:
        if tensor.device == "CPU":
            memories.append(_memory(tensor).reshape(-1).view(np.uint8))
        else:
            _fill_zero(tensor)
    if memories:
        thread = threading.Thread(target=_touch, args=[memories], daemon=True)
        thread.start()
        _touching.append(thread)


def _touch(memories: Iterable[NumpyArray]) -> None:
    stand_back(15)  # whatever else there is to do is waited for
    for memory in memories:
        for start in range(0, len(memory), TOUCH_BYTES):
            if _enough.is_set():
                return
            memory[start : start + TOUCH_BYTES : mmap.PAGESIZE] = 0


@contextmanager
def filling(tensor: Tensor) -> Iterator[NumpyArray]:
    """An array to put a tensor's numbers into, part by part: on the CPU the memory itself."""
    settle()
    if tensor.device == "CPU":
        yield _memory(tensor)
        return
    values = np.empty(tensor.shape, _numpy_type(tensor))
    yield values
    write_new(tensor, values)


def read(tensor: Tensor) -> NumpyArray:
    """A tensor's numbers; on the CPU the memory itself, so it must be used before the next step.

    bfloat16 comes as uint16, since numpy has no such type.
    """
    settle()
    return _memory(tensor)


def _memory(tensor: Tensor) -> NumpyArray:
    memory = buffer_of(tensor).as_memoryview(allow_zero_copy=True)
    return np.frombuffer(memory, dtype=_numpy_type(tensor))[: tensor.numel()].reshape(tensor.shape)


def _numpy_type(tensor: Tensor) -> npt.DTypeLike:
    return np.uint16 if tensor.dtype == dtypes.bfloat16 else np.dtype(tensor.dtype.fmt)
