"""Products and attention by their GPU forms on OpenCL, in tinygrad's graph: prints JSON.

For each case the results that are wrong, by name. A process of its own, since pocl reads
POCL_MAX_PTHREAD_COUNT when it is loaded.
"""

import json
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
from gpu_kernels import attention_formula, beyond, turned_back
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.model.int4 import quantize_rows
from tinyllama.ops import forms
from tinyllama.ops.attention import attention
from tinyllama.ops.gpu.attention import attention as gpu_attention
from tinyllama.ops.int4 import int4_linear
from tinyllama.ops.matmul import NN, NT, TN, gemm, linear
from tinyllama.ops.products import together
from tinyllama.ops.rope import tables
from tinyllama.ops.sums import into_products
from tinyllama.ops.swiglu import swiglu
from tinyllama.runtime import blocks

F32, BF16, F16 = dtypes.float32, dtypes.bfloat16, dtypes.float16
# Of the largest number: sums in another order, and results rounded to 8 and to 11 bits, twice.
ALLOWED = {F32: 2e-6, BF16: 1.2e-2, F16: 1.5e-3}
RANDOM = np.random.default_rng(7)


def normal(*shape: int, dtype=F32) -> Tensor:
    values = RANDOM.standard_normal(shape).astype(np.float32)
    return Tensor(values).cast(dtype).contiguous().realize()


def array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy().astype(np.float64)


def compared(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *fixed: Tensor,
    finish: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> dict:
    """Value and gradients of `tensors` where the GPU form differs from the portable one.

    `kernels` is how many kernels of ours computed them, after `finish`.
    """
    results, calls = {}, {}
    slope = None
    for form in ("portable", "gpu"):
        with forms.forced(form):
            out = function(*tensors, *fixed)
            slope = normal(*out.shape, dtype=out.dtype) if slope is None else slope
            all_of_it = finish([out, *out.gradient(*tensors, gradient=slope)])
            calls[form] = kernels(all_of_it)
            results[form] = [array(t.contiguous()) for t in all_of_it]
    assert calls["portable"] == 0
    wrong = beyond(results["gpu"], results["portable"], ALLOWED[tensors[0].dtype])
    return wrong | {"kernels": calls["gpu"]}


def kernels(tensors: Sequence[Tensor]) -> int:
    nodes = Tensor.stack(*(t.flatten().sum() for t in tensors)).uop.toposort()
    return sum(u.op is Ops.CALL and u.src[0].op is Ops.PROGRAM for u in nodes)


def packed_product(block: int) -> dict:
    weight = RANDOM.standard_normal((40, 64)).astype(np.float32)
    packed, scales = (Tensor(part).realize() for part in quantize_rows(weight, block))
    return compared(int4_linear, [normal(2, 19, 64, dtype=BF16)], packed, scales)


def attending(dtype, D: int) -> dict:
    starts = np.zeros((2, 37), np.int32)
    starts[0, 20:], starts[1, 5:] = 20, 5
    shapes = [(2, 37, 4, D), (2, 37, 2, D), (2, 37, 2, D)]
    return compared(attention, [normal(*s, dtype=dtype) for s in shapes], Tensor(starts))


def feed_forward(dtype, inner: int) -> dict:
    weights = [normal(inner, 24), normal(inner, 24), normal(24, inner)]
    return compared(
        lambda x, gate, up, down: linear(swiglu(linear(x, gate), linear(x, up)), down),
        [normal(2, 19, 24, dtype=dtype), *weights],
    )


def self_attention(dtype, H: int, KV: int, D: int, T: int = 37, width: int = 24) -> dict:
    """With positions and documents, and with what shares a launch put together, as a layer has it.

    Against float64: the portable form rounds q and k once more before it turns them. Weights are as
    small as a model's, so that scores are too; else rounding decides which key is seen.
    """
    starts = np.zeros((2, T), np.int32)
    starts[0, 20:], starts[0, 29:], starts[1, 5:] = 20, 29, 5
    cos, sin = tables(D, 10000.0, T)
    x, slope = normal(2, T, width, dtype=dtype), normal(2, T, H, D, dtype=dtype)
    weights = [small(n * D, width) for n in (H, KV, KV)]
    with forms.forced("gpu"):
        heads = [linear(x, w).reshape(2, T, w.shape[0] // D, D) for w in weights]
        out = attention(*heads, Tensor(starts), (Tensor(cos), Tensor(sin)))
        gradients = out.gradient(x, *weights, gradient=slope)
        results = together(into_products([out, *gradients]))
        calls, found = kernels(results), [array(t.contiguous()) for t in results]
    rounded = [array(w.cast(dtype)) for w in weights]
    wanted = self_attention_formula(array(x), rounded, array(slope), starts, np.arctan2(sin, cos))
    return beyond(found, wanted, ALLOWED[dtype]) | {"kernels": calls}


def small(rows: int, columns: int) -> Tensor:
    return (normal(rows, columns) * columns**-0.5).contiguous().realize()


def self_attention_formula(
    x: np.ndarray,
    weights: Sequence[np.ndarray],
    slope: np.ndarray,
    starts: np.ndarray,
    angles: np.ndarray,
) -> list[np.ndarray]:
    """out, dx and the gradients of the weights of q, k and v in float64; angles (T, D / 2)."""
    B, T, width = x.shape
    q, k, v = ((x @ w.T).reshape(B, T, -1, slope.shape[3]) for w in weights)
    turned = [turned_back(heads, -angles) for heads in (q, k)]
    found = attention_formula(*turned, v, slope, starts)
    heads = [turned_back(found["dq"], angles), turned_back(found["dk"], angles), found["dv"]]
    flat = [d.reshape(B * T, -1) for d in heads]
    dx = sum(d @ w for d, w in zip(flat, weights, strict=True))
    return [found["out"], dx.reshape(x.shape), *(d.T @ x.reshape(-1, width) for d in flat)]


def written_in_place() -> dict:
    """dW added to what is there and y written over another tensor; a sum in parts."""
    a, b, x = normal(30, 24), normal(30, 40), normal(5, 24)
    there, other, w = normal(24, 40), normal(5, 40), normal(40, 24)
    c, d = normal(1000, 24), normal(1000, 40)
    wanted = [array(there) + array(a).T @ array(b), array(x) @ array(w).T, array(c).T @ array(d)]
    with forms.forced("gpu"), mock.patch.object(blocks, "multiprocessors", lambda device: 4):
        added = gemm(TN, a, b, onto=there).realize()
        over = gemm(NT, x, w, over=other).realize()
        parts = gemm(TN, c, d)
        split = any(len(u.shape) == 3 for u in parts.uop.toposort() if u.op is Ops.AFTER)
        found = [*map(array, (added, over, parts, there, other))]
    wanted += wanted[:2]  # in the same memory
    wrong = beyond(found, wanted, ALLOWED[F32])
    return wrong if split else wrong | {"split": 0}


def granted() -> dict:
    """Gradients of attention in float32 with D 128 need 33 KB of local memory; pocl has more."""
    limits = blocks.limits_of("CL")
    launch = gpu_attention("opencl", "gradient_q", 1, 9, 1, 1, 128, "float32", limits=limits)
    return {} if 33 << 10 <= launch.shared_bytes <= limits.shared_bytes else {"limits": str(limits)}


def summed() -> dict:
    """A chain of products has no sum of its own."""
    pairs = [(normal(7, 12), normal(12, 24)) for _ in range(3)]
    with forms.forced("gpu"):
        first, second, third = (gemm(NN, a, b) for a, b in pairs)
        (total,) = into_products([first + second + third])
        sums = sum(u.op is Ops.ADD and u.dtype == F32 for u in total.uop.toposort())
        found = array(total)
    wanted = sum(array(a) @ array(b) for a, b in pairs)
    wrong = beyond([found], [wanted], ALLOWED[F32])
    return wrong | {"sums": sums} if sums else wrong


CASES: dict[str, Callable[[], dict]] = {
    "linear, float32, addend": lambda: compared(
        linear, [normal(3, 37, 72), normal(40, 72), normal(3, 37, 40)]
    ),
    "linear, bfloat16, rank 8": lambda: compared(
        linear, [normal(3, 37, 72, dtype=BF16), normal(8, 72)]
    ),
    "linear, float16, gradients of odd rows": lambda: compared(
        linear, [normal(3, 37, 72, dtype=F16), normal(42, 72)]
    ),
    "linear, float32, odd": lambda: compared(linear, [normal(3, 37, 71), normal(41, 71)]),
    "4 bits, groups of 32": lambda: packed_product(32),
    "4 bits, groups of 16": lambda: packed_product(16),
    "attention, bfloat16, D 32": lambda: attending(BF16, 32),
    "attention, float32, D 24": lambda: attending(F32, 24),
    # gate and up; down; dgate and dup; dx; three of weights
    "feed-forward, bfloat16": lambda: feed_forward(BF16, 48),
    "feed-forward, float32": lambda: feed_forward(F32, 48),
    # A group of lanes is as wide as the block.
    "feed-forward, float32, narrow": lambda: feed_forward(F32, 24),
    # q, k and v; attention; delta; dq; dk and dv; dx; of weights
    "self-attention, float32": lambda: self_attention(F32, 2, 2, 32),
    # q has another size than k and v: its product and what follows are launches of their own.
    "self-attention, bfloat16, two per key": lambda: self_attention(BF16, 2, 1, 32),
    "self-attention, float32, three per key": lambda: self_attention(F32, 6, 2, 48, 41, 40),
    "self-attention, float16, four per key": lambda: self_attention(F16, 4, 1, 64, 33),
    "local memory": granted,
    "in place": written_in_place,
    "sums": summed,
}

if __name__ == "__main__":
    print(json.dumps({name: case() for name, case in CASES.items()}))
