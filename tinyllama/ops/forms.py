"""Which form of an operation runs: chosen here, for all operations.

    portable   plain tinygrad tensors, which every device runs
    cpu        C kernels (`ops/cpu/*.c`), for tensors on the CPU where clang compiles them

Both forms of an operation have one signature. Of those that an operation offers, the first in
APPLIES that can compute its tensors runs. `forced` makes every operation take one form, whatever
the device; TINYLLAMA_KERNELS=0 leaves the portable one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from tinygrad import Tensor

from tinyllama.runtime import kernel
from tinyllama.runtime.cpu import clang_compiles
from tinyllama.runtime.patches import install
from tinyllama.system import device

Form = Literal["portable", "cpu"]
F = TypeVar("F")
_forced: list[Form] = []


def _cpu_applies(tensors: Sequence[Tensor]) -> bool:
    """Tensors on the CPU, of types that kernels know, compiled by clang, and not switched off."""
    if any(t.device != "CPU" or t.dtype not in kernel.TYPE_CODE for t in tensors):
        return False
    return device.kernels_enabled() and clang_compiles()


# The forms, best first, and whether each can compute with given tensors.
APPLIES: dict[Form, Callable[[Sequence[Tensor]], bool]] = {
    "cpu": _cpu_applies,
    "portable": lambda tensors: True,
}


def chosen(*tensors: Tensor) -> Form:
    """The form in which an operation computes with these tensors."""
    install()
    if _forced:
        return _forced[-1]
    return next(form for form, applies in APPLIES.items() if applies(tensors))


def choose(*tensors: Tensor, portable: F, cpu: F) -> F:
    """The one of an operation's forms (functions of one signature) that computes with `tensors`."""
    forms: dict[Form, F] = {"portable": portable, "cpu": cpu}
    return forms[chosen(*tensors)]


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Make every operation take one form, whatever the device. For tests and benchmarks."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()
