"""Which form of an operation runs: chosen here, for all operations.

    portable   plain tinygrad tensors, which every device runs
    cpu        C kernels (`ops/cpu/*.c`), for tensors on the CPU where clang compiles them
    gpu        kernels for CUDA, Metal and OpenCL (`ops/gpu/*.c`), for tensors on such a GPU

All forms of an operation have one signature. Of those that an operation offers, the first in
APPLIES that can compute its tensors runs; where it has none for a GPU, or that one does not take
the tensors' sizes (UnsupportedSize, or kernel.LARGEST rows or columns), the portable one does.
`forced` makes every operation take one form, whatever the device; TINYLLAMA_KERNELS=0 leaves the
portable one, and TINYLLAMA_KERNELS=all takes kernels also in OpenCL on the processor.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, ParamSpec, TypeVar

from tinygrad import Tensor

from tinyllama.runtime import kernel
from tinyllama.runtime.blocks import UnsupportedSize, dialect_of, is_processor
from tinyllama.runtime.cpu import clang_compiles
from tinyllama.runtime.patches import install
from tinyllama.system import device

Form = Literal["portable", "cpu", "gpu"]
P = ParamSpec("P")
R = TypeVar("R")
_forced: list[Form] = []


def _cpu_applies(tensors: Sequence[Tensor]) -> bool:
    """Tensors on the CPU, of types and sizes that kernels take, compiled by clang, and not switched
    off."""
    if any(t.device != "CPU" or t.dtype not in kernel.TYPE_CODE for t in tensors):
        return False
    if not all(map(_counted, tensors)):
        return False
    return device.kernels_enabled() and clang_compiles()


def _counted(tensor: Tensor) -> bool:
    """Whether kernels can count a tensor's columns, those of its last axis, and its rows."""
    columns = tensor.shape[-1] if tensor.ndim else 1
    return columns < kernel.LARGEST and tensor.numel() < kernel.LARGEST * max(columns, 1)


def _gpu_applies(tensors: Sequence[Tensor]) -> bool:
    """Tensors on one GPU whose language is known, of types and sizes that kernels take, and not
    switched off.

    OpenCL on the processor is no GPU: pocl 3.1 runs kernels right on one thread alone, and there a
    small model's step took 1.4 s, in portable form 0.2 s, and on two threads 0.1 s.
    """
    place = tensors[0].device
    if any(t.device != place or t.dtype not in kernel.TYPE_CODE for t in tensors):
        return False
    if not all(map(_counted, tensors)):
        return False
    if not device.kernels_enabled() or not isinstance(place, str) or dialect_of(place) is None:
        return False
    return device.kernels_enabled_everywhere() or not is_processor(place)


# The forms, best first, and whether each can compute with given tensors.
APPLIES: dict[Form, Callable[[Sequence[Tensor]], bool]] = {
    "cpu": _cpu_applies,
    "gpu": _gpu_applies,
    "portable": lambda tensors: True,
}


def chosen(*tensors: Tensor) -> Form:
    """The form in which an operation computes with these tensors."""
    install()
    if _forced:
        return _forced[-1]
    return next(form for form, applies in APPLIES.items() if applies(tensors))


def choose(
    *tensors: Tensor,
    portable: Callable[P, R],
    cpu: Callable[P, R],
    gpu: Callable[P, R] | None = None,
) -> Callable[P, R]:
    """The one of an operation's forms (functions of one signature) that computes with `tensors`."""
    form = chosen(*tensors)
    if form == "gpu" and gpu is not None:
        return _where_supported(gpu, portable)
    return cpu if form == "cpu" else portable


def _where_supported(gpu: Callable[P, R], portable: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(gpu)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return gpu(*args, **kwargs)
        except UnsupportedSize:
            return portable(*args, **kwargs)

    return run


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Make every operation take one form, whatever the device. For tests and benchmarks."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()
