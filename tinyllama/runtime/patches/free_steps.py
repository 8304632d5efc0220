"""Captured steps that are freed on a thread that runs no kernels.

A captured step waits for the device before its memory is freed. Python may collect garbage on any
thread, so also on one that runs kernels, which would then wait for itself forever.
"""

import threading
from typing import Any

from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.runtime.ops_cpu import CPUWorker

from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, a step that is collected on a thread that runs kernels is freed on another."""
    free = HCQGraph.__del__

    def free_elsewhere(step: Any) -> None:
        if isinstance(threading.current_thread(), CPUWorker):
            threading.Thread(target=free, args=(step,), name="free").start()
        else:
            free(step)

    HCQGraph.__del__ = free_elsewhere


PATCH = Patch(
    name="free_steps",
    replaces=("tinygrad.runtime.graph.hcq.HCQGraph.__del__",),
    why="frees a captured step on another thread where the garbage collector meets it on one that"
    " runs kernels, which would wait for itself forever",
    test="tests/system/test_device.py"
    "::test_a_step_that_is_collected_on_a_kernel_thread_does_not_wait_for_itself",
    apply=apply,
)
