"""A captured step runs first when every tensor has been written.

Weights and optimizer state are filled on other threads while the step is built and lowered
(runtime/fills.py). tinygrad runs the step as soon as it is lowered.
"""

from typing import Any

from tinygrad.engine import jit

from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, lowering a captured step ends by waiting for the threads that write tensors."""
    lower = jit.jit_lower

    def lower_and_wait(*args: Any) -> Any:
        lowered = lower(*args)
        finish_background_writes()
        return lowered

    jit.jit_lower = lower_and_wait


PATCH = Patch(
    name="wait_when_lowered",
    replaces=("tinygrad.engine.jit.jit_lower",),
    why="waits before a step's first run for the threads that fill weights and optimizer state",
    needed="a first step would compute with weights that are not written yet",
    test="tests/runtime/test_patches.py::test_a_step_runs_first_when_every_tensor_is_written",
    apply=apply,
)
