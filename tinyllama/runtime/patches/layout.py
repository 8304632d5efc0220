"""Our layout of memory (runtime/layout.py) in place of tinygrad's planner.

tinygrad's planner places tensors in the order in which they are made, which leaves holes; it does
not see kernels that read a slice of a tensor; and it gives every tensor memory of its own where a
device has no slices (OpenCL), four times what is alive at once.
"""

from tinygrad import schedule
from tinygrad.engine import jit
from tinygrad.schedule import memory

from tinyllama.runtime.layout import lay_out
from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, what tinygrad schedules and captures is laid out by us."""
    for module in (memory, schedule, jit):
        module.memory_plan_rewrite = lay_out


PATCH = Patch(
    name="layout",
    replaces=(
        "tinygrad.schedule.memory.memory_plan_rewrite",
        "tinygrad.schedule.memory_plan_rewrite",
        "tinygrad.engine.jit.memory_plan_rewrite",
    ),
    why="lets the tensors of a step share memory with hardly any holes, as the memory estimate"
    " counts it; without it a step takes more than the estimate says",
    test="tests/runtime/test_planned_memory.py"
    "::test_a_captured_step_computes_the_same_in_the_memory_that_it_shares",
    apply=apply,
)
