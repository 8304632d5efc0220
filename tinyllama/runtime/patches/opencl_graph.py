"""Captured steps on OpenCL by one native call (runtime/opencl.py)."""

from typing import Any

from tinygrad.device import Device
from tinygrad.engine import jit
from tinygrad.helpers import PROFILE
from tinygrad.uop.ops import UOp

from tinyllama.runtime.opencl import QueueGraph, can_enqueue
from tinyllama.runtime.patches.patch import Patch
from tinyllama.system import device


def apply() -> None:
    """From here on, an OpenCL device has graphs when a captured step is divided into them."""
    divide = jit.graph_split_rewrite

    def divide_for_opencl(linear: UOp, *args: Any, **options: Any) -> UOp:
        name = Device.DEFAULT
        if name.startswith("CL") and device.kernels_enabled() and not PROFILE and can_enqueue():
            opened = Device[name]
            opened.graph = QueueGraph
        return divide(linear, *args, **options)

    jit.graph_split_rewrite = divide_for_opencl


PATCH = Patch(
    name="opencl_graph",
    replaces=("tinygrad.engine.jit.graph_split_rewrite",),
    why="puts a captured step's kernels into OpenCL's queue by one native call; tinygrad has no"
    " graphs for OpenCL and starts each kernel from Python, 20 to 40 microseconds each",
    test="tests/runtime/test_opencl.py::test_a_captured_step_is_one_native_call_per_batch",
    apply=apply,
)
