"""Hooks for recording: which lines kernels come from, and when those run (runtime/timing.py).

They act only within `noted_by` and `divided_into`: otherwise tinygrad does what it always does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tinygrad import tensor
from tinygrad.device import Device
from tinygrad.engine import jit
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime.patches.patch import Patch

# Called with a device's name; the class of its graphs, or None for those that it has.
GraphOf = Callable[[str], Any]


@contextmanager
def divided_into(graph_of: GraphOf) -> Iterator[None]:
    """Steps captured within run as graphs of these classes, also where one is a single kernel."""
    divide = jit.graph_split_rewrite

    def divide_as_said(linear: UOp, *args: Any, **options: Any) -> UOp:
        opened = Device[Device.DEFAULT]
        graph = graph_of(Device.DEFAULT.partition(":")[0])
        if graph is not None:
            opened.graph = graph
        divided = divide(linear, *args, **options)
        return divided.replace(src=tuple(_as_graph(call) for call in divided.src))

    jit.graph_split_rewrite = divide_as_said
    try:
        yield
    finally:
        jit.graph_split_rewrite = divide


def _as_graph(call: UOp) -> UOp:
    """A kernel that is a batch of its own, as a graph; tinygrad would start it by itself."""
    is_lone = call.src[0].op is Ops.PROGRAM and Device[call.device].graph is not None
    return jit.create_graph_call([call]) if is_lone else call


@contextmanager
def noted_by(make: Callable[..., Any]) -> Iterator[None]:
    """Metadata of operations that are made within is made by `make`."""
    made = tensor.Metadata
    tensor.Metadata = make
    try:
        yield
    finally:
        tensor.Metadata = made


def apply() -> None:
    """Nothing yet: recording itself replaces what it needs, and puts it back."""


PATCH = Patch(
    name="recording",
    replaces=(),
    why="lets `tinyllama profile` and traces know when each kernel of a step ran, and which line"
    " of the model it comes from: only meanwhile it replaces `tensor.Metadata` and"
    " `engine.jit.graph_split_rewrite`",
    needed="profiles and traces would have neither lines nor times",
    test="tests/reports/test_profile.py::test_every_kernel_of_a_training_step_has_a_line",
    apply=apply,
)
