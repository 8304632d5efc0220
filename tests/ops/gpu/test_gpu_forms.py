"""Operations' GPU forms in tinygrad's graph: values and gradients; which kernels a step has."""

import collections
import functools

import gpu_forms
import pytest
from opencl import needs_opencl, printed_on_opencl
from runs_helpers import printed_json

FORM_KERNELS = {  # of a value and its gradients, products included
    "rms_norm": 3,
    "swiglu": 2,
    "rope": 2,
    "loss": 4,
    "token losses": 2,
    "embedding": 2,
    "cached attention": 2,
}
KERNELS = {  # of a 124m step, 8 x 1024: 12 layers, 111 parameters in groups of 64
    "rms_norm_forward": 25,
    "rms_norm_backward": 25,
    "column_sum": 25,
    "delta": 12,
    "cross_entropy": 2,
    "embedding_order": 1,
    "embedding_backward": 1,
    "square_sum": 2,
    "adamw": 2,
}


@functools.cache
def on_opencl() -> dict:
    return printed_on_opencl("gpu_forms.py")


@needs_opencl
@pytest.mark.parametrize("name", gpu_forms.CASES)
def test_the_form_for_a_gpu_equals_the_portable_one(name: str) -> None:
    assert on_opencl()[name] == {"kernels": FORM_KERNELS[name]}


@needs_opencl
def test_the_residuals_gradient_is_added_by_the_norms_kernel() -> None:
    """Forward, backward and the sum of its parts; the backward kernel runs once."""
    assert on_opencl()["with a residual"] == {"sums": 0, "kernels": 3}


STEP = """
import json, sys
from tinygrad import Tensor, dtypes
from tinyllama.ops.adamw import SCALARS
from tinyllama.reports.backends import Row
from tinyllama.system import device
from tinyllama.train.memory_estimate import blank_step
device.select()
row = Row("", "", "compiled", dtype="bfloat16")
batch = [Tensor.empty(8, 1024, dtype=dtypes.int32) for _ in range(3)]
step = blank_step(row.configuration())
found = step.account(*batch, hyperparameters=Tensor.empty(len(SCALARS)), compiling=False)
print(json.dumps([(launch.name, launch.times) for launch in found.launches]))
"""


def test_the_operations_of_a_124m_step_are_kernels_of_ours() -> None:
    counts: collections.Counter[str] = collections.Counter()
    for name, times in printed_json("-c", STEP, DEV="NULL:CUDA:sm_90"):
        counts.update({kernel: times for kernel in KERNELS if name.startswith(f"{kernel}_")})
    assert counts == KERNELS
