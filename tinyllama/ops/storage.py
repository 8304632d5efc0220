"""Moving numbers between numpy and a tensor's own memory, without a graph."""

from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer

from tinyllama.ops.memory import use_huge_pages

NumpyArray = npt.NDArray[Any]


def buffer_of(tensor: Tensor) -> Buffer:
    """The memory behind a tensor that is a whole buffer, allocated now if it was not."""
    if tensor.device == "CPU":
        use_huge_pages()
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "tensor is spread over several devices"
    return buffer.ensure_allocated()


def write(tensor: Tensor, array: NumpyArray) -> None:
    """Overwrite a tensor by an array of its shape and item size (bfloat16 as uint16), in place."""
    assert array.shape == tensor.shape and array.itemsize == tensor.dtype.itemsize
    if tensor.device == "CPU":
        read(tensor)[...] = array
        return
    values = np.require(array, requirements=["C", "W"])  # tinygrad asks for writable memory
    buffer_of(tensor).copyin(memoryview(values.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def fill_zero(tensor: Tensor) -> None:
    """Overwrite a tensor by zeros, in place."""
    if tensor.device == "CPU":
        read(tensor)[...] = 0
    else:
        write(tensor, np.zeros(tensor.shape, np.dtype(tensor.dtype.fmt)))


def read(tensor: Tensor) -> NumpyArray:
    """A tensor's numbers; on the CPU the memory itself, so it must be used before the next step.

    bfloat16 comes as uint16, since numpy has no such type.
    """
    dtype = np.uint16 if tensor.dtype == dtypes.bfloat16 else np.dtype(tensor.dtype.fmt)
    memory = buffer_of(tensor).as_memoryview(allow_zero_copy=True)
    return np.frombuffer(memory, dtype=dtype)[: tensor.numel()].reshape(tensor.shape)
