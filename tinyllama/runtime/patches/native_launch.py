"""Captured steps on the CPU by one native call per thread (runtime/threads.py)."""

from typing import Any

from tinygrad.runtime.ops_cpu import CPUDevice

from tinyllama.runtime.patches.patch import Patch
from tinyllama.runtime.threads import make_graph


def apply() -> None:
    """From here on, what runs a captured step on the CPU is made by `threads.make_graph`.

    A property of the class comes before the attribute that each device has, so it does not matter
    whether the device is open yet.
    """

    def keep_ours(_cpu: Any, _graph: Any) -> None:
        pass

    CPUDevice.graph = property(lambda _cpu: make_graph, keep_ours)


PATCH = Patch(
    name="native_launch",
    replaces=("tinygrad.runtime.ops_cpu.CPUDevice.graph",),
    why="starts the kernels of a step by one native call per thread; tinygrad's Python queues take"
    " 50 to 100 microseconds per kernel, half the time of a small model's step",
    test="tests/runtime/test_threads.py::test_training_is_bit_equal_to_tinygrads_own_launches",
    apply=apply,
)
