"""Products and attention as GPU kernels in tinygrad's graph: values, gradients, how many."""

import collections
import functools
import re

import gpu_products
import pytest
from opencl import needs_opencl, printed_on_opencl
from runs_helpers import printed_json

# Kernels of ours for a value and its gradients; other sizes are left to the portable form.
KERNELS = {
    "linear, float32, addend": 3,
    "linear, bfloat16, rank 8": 3,
    "linear, float16, gradients of odd rows": 1,
    "linear, float32, odd": 0,
    "4 bits, groups of 32": 2,
    "4 bits, groups of 16": 0,
    "feed-forward, bfloat16": 7,
    "feed-forward, float32": 7,
    "feed-forward, float32, narrow": 7,
    "self-attention, float32": 7,
    "self-attention, bfloat16, two per key": 10,
    # On OpenCL heads of more than 32 columns are turned by launches of their own.
    "self-attention, float32, three per key": 12,
    "self-attention, float16, four per key": 12,
    "attention, bfloat16, D 32": 4,
    "attention, float32, D 24": 0,
}


@functools.cache
def on_opencl() -> dict:
    return printed_on_opencl("gpu_products.py")


@needs_opencl
@pytest.mark.parametrize("case", gpu_products.CASES)
def test_the_form_for_a_gpu_is_right(case: str) -> None:
    expected = {"kernels": KERNELS[case]} if case in KERNELS else {}
    assert on_opencl()[case] == expected


STEP = """
import json, re, sys
from tinyllama.system import device
device.select()
from tinyllama.config import config_from_toml
from tinyllama.train.memory_estimate import blank_step, estimate_memory
from tinygrad.engine.realize import capturing
from tinygrad import Tensor, dtypes

kernels = []
class Recorder:
    def add_linear(self, linear, variables):
        kernels.extend(linear.src)

config = config_from_toml(open("configs/124m.toml").read(), "124m", sys.argv[1:])
step, shape = blank_step(config), (config.training.micro_batch, config.context_length)
batch = [Tensor.empty(*shape, dtype=dtypes.int32) for _ in range(3)]
capturing.append(Recorder())
step._whole_step(*batch, Tensor.empty(8))
capturing.clear()
programs = [k.src[0] for k in kernels if k.src[0].op.name == "PROGRAM"]
print(json.dumps([(p.arg.name, len(p.src), "#define ADDEND 1" in p.src[3].arg) for p in programs]))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_products_and_attention_of_a_124m_step_are_kernels_of_ours(dtype: str) -> None:
    sizes = ("training.batch_size=8", "data.context_length=1024", f"training.dtype={dtype}")
    programs = printed_json("-c", STEP, *sizes, DEV="NULL:CUDA:sm_90")
    names = collections.Counter(re.sub(r"_\d+", "", name) for name, *_ in programs)
    layers, chunks = 12, 2  # of the head's rows
    # Two products with tiles of 128 in float32 take more registers than there are.
    weights = {
        "float32": {"gemm_tn_batch3": layers, "gemm_tn": 4 * layers + chunks},
        "bfloat16": {
            "gemm_tn_batch3": layers, "gemm_tn_batch2": layers, "gemm_tn": 2 * layers + chunks,
        },
    }[dtype]  # fmt: skip
    assert {n: c for n, c in names.items() if n.startswith(("gemm", "attention"))} == {
        "gemm_nt_batch3": layers,  # q, k, v
        "gemm_nt_gated2": layers,  # gate, up
        "gemm_nt": 2 * layers + chunks,  # o, down
        "gemm_nn_ungated2": layers,  # of gate and up, by the gradient of down
        "gemm_nn_sum2": layers,  # of their input
        "gemm_nn_sum3": layers,  # of the input of q, k, v
        "gemm_nn": layers + chunks,  # of o
        **weights,
        "attention_forward": layers,
        "attention_gradient_q": layers,
        "attention_gradient_kv": layers,
    }
    # Sums: what a layer adds to its input.
    adding = [name for name, _, addend in programs if addend and name.startswith("gemm")]
    assert len(adding) == 2 * layers


def test_what_is_computed_again_for_the_gradient_shares_launches_too() -> None:
    sizes = ("training.batch_size=2", "data.context_length=256", "model.num_layers=2")
    recomputed = ("training.dtype=bfloat16", "training.checkpoint_activations=true")
    programs = printed_json("-c", STEP, *sizes, *recomputed, DEV="NULL:CUDA:sm_90")
    names = collections.Counter(re.sub(r"_\d+", "", name) for name, *_ in programs)
    forward, backward = ("gemm_nt_batch3", "gemm_nt_gated2"), ("gemm_nn_sum3", "gemm_tn_batch3")
    assert {name: names[name] for name in (*forward, *backward)} == {
        **dict.fromkeys(forward, 2 * 2),
        **dict.fromkeys(backward, 2),
    }
