"""Moving numbers between numpy and a tensor's own memory, without a graph."""

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer, BufferSpec, Device

from tinyllama.runtime import fills
from tinyllama.runtime.cpu import cpu_device
from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.patches import install

NumpyArray = npt.NDArray[Any]


def later(fill: Callable[[], None], tensors: Iterable[Tensor]) -> None:
    """Run `fill`, which writes `tensors`, on another thread, while the step's graph is built.

    Reading or writing a tensor here, and running a captured step, wait for it. The tensors get
    their memory here: while tinygrad generates code, no thread may ask for any.
    """
    for tensor in tensors:
        buffer_of(tensor)
    fills.submit(fill)


def buffer_of(tensor: Tensor) -> Buffer:
    """The memory behind a tensor that is a whole buffer, allocated now if it was not."""
    install()
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "tensor is spread over several devices"
    return buffer.ensure_allocated()


def memory_key(tensor: Tensor) -> Hashable:
    """A key of dictionaries: the same for tensors of the same memory, whatever their shapes."""
    key: Hashable = tensor.uop.base
    return key


def alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory: assigning to it leaves `tensor` as it is."""
    return Tensor(tensor.uop)


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
    finish_background_writes()
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
    finish_background_writes()
    _fill_zero(tensor)


def _fill_zero(tensor: Tensor) -> None:
    if tensor.device != "CPU":
        write_new(tensor, np.zeros(tensor.shape, _numpy_type(tensor)))
        return
    install()
    buffer = tensor.uop.base.buffer
    if not (isinstance(buffer, Buffer) and _allocate_zeros(buffer)):
        _memory(tensor)[...] = 0


def _allocate_zeros(buffer: Buffer) -> bool:
    """Give a CPU buffer that has no memory yet new memory, which is zero and untouched.

    False, with nothing done, where the buffer has memory or the system may not clear it.
    """
    if buffer.is_initialized() or os.name != "posix":
        return False
    # Not allocator.alloc, which hands out again what was freed.
    buffer.allocate(cpu_device().allocator._alloc(buffer.nbytes, BufferSpec()))
    return True


def begin_zero(tensors: Iterable[Tensor]) -> None:
    """Zeros for new tensors that nothing has used yet; neither waits nor is waited for.

    On the CPU another thread writes to each of their pages meanwhile (`fills.touch`).
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
        fills.touch(memories)


@contextmanager
def filling(tensor: Tensor) -> Iterator[NumpyArray]:
    """An array to put a tensor's numbers into, part by part: on the CPU the memory itself."""
    finish_background_writes()
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
    finish_background_writes()
    return _memory(tensor)


def _memory(tensor: Tensor) -> NumpyArray:
    memory = buffer_of(tensor).as_memoryview(allow_zero_copy=True)
    return np.frombuffer(memory, dtype=_numpy_type(tensor))[: tensor.numel()].reshape(tensor.shape)


def _numpy_type(tensor: Tensor) -> npt.DTypeLike:
    return np.uint16 if tensor.dtype == dtypes.bfloat16 else np.dtype(tensor.dtype.fmt)
