"""Sizes that are written into a compiled kernel when it is loaded.

clang then compiles a kernel once for all sizes. tinygrad passes what ProgramInfo.aux holds, here
the sizes, to the constructor of the CPU's program, which knows nothing of it.
"""

import struct
from collections.abc import Sequence
from typing import Any

from tinygrad.runtime.ops_cpu import CPUProgram

from tinyllama.runtime.patches.patch import Patch

# Stands before a kernel's sizes in its object: a number that occurs nowhere else.
MARK = 0x9E3779B97F4A7C15


def with_sizes(code: bytes, sizes: Sequence[int]) -> bytes:
    """A compiled kernel in which these numbers follow the mark."""
    if not sizes:
        return code
    mark = struct.pack("=Q", MARK)
    assert code.count(mark) == 1, "a kernel's sizes stand behind exactly one mark"
    start = code.index(mark) + len(mark)
    numbers = struct.pack(f"={len(sizes)}q", *sizes)
    return code[:start] + numbers + code[start + len(numbers) :]


def apply() -> None:
    """From here on, a program for the CPU may be given sizes."""
    load = CPUProgram.__init__

    def load_with_sizes(
        program: CPUProgram, cpu: Any, name: str, code: bytes, *sizes: int, **options: Any
    ) -> None:
        load(program, cpu, name, with_sizes(code, sizes), **options)

    CPUProgram.__init__ = load_with_sizes


PATCH = Patch(
    name="kernel_sizes",
    replaces=("tinygrad.runtime.ops_cpu.CPUProgram.__init__",),
    why="writes sizes into a compiled kernel when it is loaded, so that one compilation serves all",
    needed="kernels would have no sizes",
    test="tests/runtime/test_kernel_sizes.py::test_a_second_size_is_not_compiled_again",
    apply=apply,
)
