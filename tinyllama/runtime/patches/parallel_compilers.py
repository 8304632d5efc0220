"""What is left to compile of a captured step on a GPU, on every core (runtime/precompile.py)."""

from typing import Any

from tinygrad.device import Device
from tinygrad.engine import jit
from tinygrad.uop.ops import UOp

from tinyllama.runtime import precompile
from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, a captured step's kernels for a GPU are compiled side by side."""
    one_by_one = jit.compile_linear

    def compile_linear(linear: UOp, *args: Any, **options: Any) -> UOp:
        if Device.DEFAULT != "CPU":
            linear = precompile.start(linear)
            precompile.wait()
        return one_by_one(linear, *args, **options)

    jit.compile_linear = compile_linear


PATCH = Patch(
    name="parallel_compilers",
    replaces=("tinygrad.engine.jit.compile_linear",),
    why="compiles a captured step's kernels for NVIDIA's cards on every core; tinygrad compiles one"
    " after another, 0.2 to 0.4 seconds each",
    test="tests/runtime/test_precompile.py::test_kernels_are_compiled_side_by_side",
    apply=apply,
)
