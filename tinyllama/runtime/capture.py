"""Captured steps: a function of tensors whose kernels are recorded once and then only launched."""

from collections.abc import Callable
from typing import Any

from tinygrad import TinyJit

from tinyllama.runtime.layout import use_layout
from tinyllama.runtime.memory import free_steps_elsewhere
from tinyllama.runtime.precompile import finishing
from tinyllama.runtime.threads import launch_natively


def captured(function: Callable[..., Any]) -> Any:
    """A compiled graph that is captured at its first call instead of its second."""
    use_layout()
    free_steps_elsewhere()
    launch_natively()
    jit = TinyJit(finishing(function))
    jit.cnt = 1
    return jit
