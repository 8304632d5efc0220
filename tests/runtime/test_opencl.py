"""Captured steps on OpenCL by one native call per batch: the same numbers, whatever changes."""

import ctypes.util

import pytest
from runs_helpers import ROOT, printed_json

pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("OpenCL") is None, reason="OpenCL is missing"
)

HEAD = f"""
import json, sys
from tinyllama.system import device
device.select()
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}]
import numpy as np
from tinygrad import Tensor, UOp
from tinygrad.engine.realize import graph_cache
from tinygrad.runtime import ops_cl
from tinyllama.runtime.capture import captured, kernel_count
from tinyllama.runtime.opencl import QueueGraph
starts = []
start = ops_cl.CLProgram.__call__
def noting(program, *buffers, **options):
    starts.append(program.name)
    return start(program, *buffers, **options)
ops_cl.CLProgram.__call__ = noting
def graphs(step):
    calls = [call.src[0] for call in step.captured.linear.src]
    return [graph_cache[call] for call in calls if call in graph_cache]
"""
STEPS = """
from model_helpers import SQUARE, build, random_batch
from tinyllama.config import TrainingConfig
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep
model = build(SQUARE)
optimizer = AdamW(model.state_dict(), TrainingConfig())
step = TrainStep(model, optimizer, 1)
results = []
for n in range(4):
    starts.clear()
    results.append(step([random_batch(SQUARE, seed=n)], n + 1, 0.01)[:2])
print(json.dumps([results, len(starts), kernel_count(step._whole), len(graphs(step._whole))]))
"""


def on_opencl(code: str, **variables: str) -> list[object]:
    found: list[object] = printed_json("-c", HEAD + code, DEV="CL", **variables)
    return found


def test_a_captured_step_is_one_native_call_per_batch() -> None:
    results, from_python, kernels, graphs = on_opencl(STEPS)
    assert isinstance(graphs, int) and isinstance(kernels, int)
    assert from_python == 0 and kernels > 100
    assert 1 < graphs < 6  # of 32, 64, 128, ... kernels
    without = on_opencl(STEPS, TINYLLAMA_PATCHES_OFF="opencl_graph")
    assert without == [results, kernels, kernels, 0]  # the same losses and norms, bit for bit


def test_tinygrads_own_launches_are_used_with_kernels_switched_off() -> None:
    _, from_python, kernels, graphs = on_opencl(STEPS, TINYLLAMA_KERNELS="0")
    assert (from_python, graphs) == (kernels, 0)


CHANGES = """
n = UOp.variable("n", 1, 9)
def function(x, y, n):
    return ((x * 2).contiguous() + (y * n).contiguous()).contiguous().realize()
step = captured(function)
def tensor(*values):
    return Tensor(list(values)).realize()
a, b, c, d = tensor(1, 2, 3), tensor(10, 20, 30), tensor(5, 5, 5), tensor(7, 8, 9)
found = [step(*inputs, n.bind(value)).tolist() for *inputs, value in
         ((a, b, 1), (c, b, 1), (c, d, 4), (c, d, 5), (a, b, 9), (b, a, 2))]
print(json.dumps([found, len(graphs(step)), len(starts)]))
"""


def test_inputs_and_variables_may_change_from_call_to_call() -> None:
    found, graphs, from_python = on_opencl(CHANGES)
    a, b, c, d = (1, 2, 3), (10, 20, 30), (5, 5, 5), (7, 8, 9)
    calls = ((a, b, 1), (c, b, 1), (c, d, 4), (c, d, 5), (a, b, 9), (b, a, 2))
    assert found == [[2 * i + n * j for i, j in zip(x, y, strict=True)] for x, y, n in calls]
    assert (graphs, from_python) == (1, 0)


FAULT = """
step = captured(lambda x: ((x * 2).contiguous() + x).contiguous().realize())
x = Tensor.ones(64).contiguous().realize()
step(x)
(graph,) = graphs(step)
graph.launches[7 + 4] = 1 << 40  # threads per block of the second kernel
try:
    step(x)
except RuntimeError as error:
    print(json.dumps(str(error).split(": ")))
"""


def test_a_launch_that_the_driver_refuses_is_named() -> None:
    what, error = on_opencl(FAULT)
    assert str(what).startswith("clEnqueueNDRangeKernel of E_")
    assert error == "OpenCL error -54" or error == "OpenCL error -55"
