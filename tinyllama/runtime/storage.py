"""Copying numbers between numpy arrays and the memory of tensors, without a graph."""

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


def fill_in_background(fill: Callable[[], None], tensors: Iterable[Tensor]) -> None:
    """Run `fill`, which writes `tensors`, on another thread while the step's graph is built.

    Functions that read or write a tensor wait for it, and so does a captured step. The tensors are
    allocated before this returns: while tinygrad generates code, no thread may allocate memory.
    """
    for tensor in tensors:
        buffer_of(tensor)
    fills.submit(fill)


def buffer_of(tensor: Tensor) -> Buffer:
    """The memory of a tensor that is a whole buffer, allocated now if it was not."""
    install()
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "tensor is spread over several devices"
    return buffer.ensure_allocated()


def memory_key(tensor: Tensor) -> Hashable:
    """A dictionary key: the same for all tensors of the same memory, whatever their shapes."""
    key: Hashable = tensor.uop.base
    return key


def alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory: assigning to it leaves `tensor` as it is."""
    return Tensor(tensor.uop)


class Inputs:
    """The tensors that a captured step is called with: the same ones, refilled for each call.

    tinygrad needs milliseconds to make a new tensor from an array: much of a small model's step.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}

    def __call__(self, *arrays: NumpyArray) -> list[Tensor]:
        """Tensors that hold the arrays' numbers until the next call with the same shapes.

        They are refilled only when every step that was called with them has run.
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
    """Overwrite a tensor with an array of its shape and item size (uint16 for bfloat16)."""
    finish_background_writes()
    write_new(tensor, array)


def write_new(tensor: Tensor, array: NumpyArray) -> None:
    """As `write`, but without waiting: for a tensor that no background thread writes."""
    assert array.shape == tensor.shape and array.itemsize == tensor.dtype.itemsize
    if tensor.device == "CPU":
        _memory(tensor)[...] = array
        return
    values = np.require(array, requirements=["C", "W"])  # tinygrad requires writable memory
    buffer_of(tensor).copyin(memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def fill_zero(tensor: Tensor) -> None:
    """Overwrite a tensor with zeros; on the CPU one without memory gets new memory instead."""
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
    # allocator.alloc would reuse freed memory, which is not zero.
    buffer.allocate(cpu_device().allocator._alloc(buffer.nbytes, BufferSpec()))
    return True


def zero_in_background(tensors: Iterable[Tensor]) -> None:
    """Zero new tensors that nothing has used yet, without waiting for other fills.

    On the CPU another thread then touches their pages (`fills.touch`).
    """
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.device == "CPU":
            _fill_zero(tensor)
    fill_in_background(functools.partial(_write_zeros, tensors), tensors)


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
    """An array to fill with a tensor's numbers, part by part: on the CPU the memory itself."""
    finish_background_writes()
    if tensor.device == "CPU":
        yield _memory(tensor)
        return
    values = np.empty(tensor.shape, _numpy_type(tensor))
    yield values
    write_new(tensor, values)


def read(tensor: Tensor) -> NumpyArray:
    """A tensor's numbers. On the CPU this is the memory itself, which the next step may change.

    bfloat16 is returned as uint16, because numpy has no bfloat16.
    """
    finish_background_writes()
    return _memory(tensor)


def _memory(tensor: Tensor) -> NumpyArray:
    memory = buffer_of(tensor).as_memoryview(allow_zero_copy=True)
    return np.frombuffer(memory, dtype=_numpy_type(tensor))[: tensor.numel()].reshape(tensor.shape)


def _numpy_type(tensor: Tensor) -> npt.DTypeLike:
    return np.uint16 if tensor.dtype == dtypes.bfloat16 else np.dtype(tensor.dtype.fmt)
