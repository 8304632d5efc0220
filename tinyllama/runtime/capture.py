"""Captured steps: a function of tensors whose kernels are recorded once and then only launched."""

from collections.abc import Callable
from typing import Any

from tinygrad import TinyJit

from tinyllama.runtime.patches import install
from tinyllama.runtime.precompile import finishing


def captured(function: Callable[..., Any]) -> Any:
    """A compiled graph that is captured at its first call instead of its second."""
    install()
    jit = TinyJit(finishing(function))
    jit.cnt = 1
    return jit
