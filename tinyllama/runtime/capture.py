"""Captured steps: a function of tensors whose kernels are recorded once and then only launched."""

from collections.abc import Callable
from typing import Any

from tinygrad import TinyJit
from tinygrad.device import Device
from tinygrad.uop.ops import Ops

from tinyllama.runtime.patches import install
from tinyllama.runtime.precompile import waiting_for_compilers


def captured(function: Callable[..., Any]) -> Any:
    """A compiled graph that is captured at its first call instead of its second."""
    install()
    jit = TinyJit(waiting_for_compilers(function))
    jit.cnt = 1
    return jit


def kernel_count(step: Any) -> int:
    """Kernels that a captured step launches, once it has run.

    tinygrad's own counter counts a graph of many kernels as one.
    """
    calls = [call.src[0] for call in step.captured.linear.src]
    graphs = [call for call in calls if call.op is Ops.CUSTOM_FUNCTION]
    return len(calls) - len(graphs) + sum(len(graph.src[0].src) for graph in graphs)


def synchronize() -> None:
    """Wait until the device has computed everything it was given."""
    Device[Device.DEFAULT].synchronize()
