"""Operations' GPU forms on OpenCL against the portable ones: prints JSON, name -> wrong results.

A process of its own: `DEV=CL TINYLLAMA_KERNELS=all POCL_MAX_PTHREAD_COUNT=1 python gpu_forms.py`.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
from tinygrad import Tensor, dtypes

from tinyllama.ops import cross_entropy, embedding, forms, rms_norm, rope, swiglu

ALLOWED = {dtypes.float32: 2e-6, dtypes.bfloat16: 1.5e-2, dtypes.float16: 2e-3}
RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def results(
    form: forms.Form, function: Callable[..., Tensor], arrays: Sequence[np.ndarray], dtype
) -> list[np.ndarray]:
    """The function's value and its gradients of `arrays`, of which vectors stay float32."""
    tensors = [
        Tensor(a).cast(dtype if a.ndim > 1 else dtypes.float32).contiguous().realize()
        for a in arrays
    ]
    with forms.forced(form):
        out = function(*tensors)
        slope = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        grads = out.gradient(*tensors, gradient=Tensor(slope).cast(out.dtype))
        return [t.contiguous().float().numpy() for t in (out, *grads)]


def loss_in_chunks(x: Tensor, w: Tensor) -> Tensor:
    return cross_entropy.linear_cross_entropy(x, w.float(), Tensor(TARGETS)).reshape(1)


def embedded(dtype) -> Callable[[Tensor], Tensor]:
    return lambda w: embedding.embedding(Tensor(IDS), w.float().contiguous(), dtype)


IDS = RANDOM.integers(0, 70, (2, 40)).astype(np.int32)
TARGETS = np.concatenate([RANDOM.integers(0, 72, 30), [-1, -1]]).astype(np.int32)
COS, SIN = rope.tables(16, 10000.0, 6)
CASES: dict[str, tuple[Callable[..., Tensor], list[np.ndarray]]] = {
    "rms_norm": (lambda x, w: rms_norm.rms_norm(x, w, 1e-5), [normal(3, 4, 48), normal(48)]),
    "swiglu": (swiglu.swiglu, [normal(3, 40), normal(3, 40)]),
    "rope": (lambda x: rope.rope(x, Tensor(COS), Tensor(SIN)), [normal(2, 6, 3, 16)]),
    "cross_entropy": (loss_in_chunks, [normal(32, 16), normal(72, 16)]),
}


def wrong(name: str, dtype) -> dict[str, float]:
    function, arrays = CASES[name] if name in CASES else (embedded(dtype), [normal(70, 24)])
    found = results("gpu", function, arrays, dtype)
    wanted = results("portable", function, arrays, dtype)
    errors = {
        str(i): float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))
        for i, (a, b) in enumerate(zip(found, wanted, strict=True))
    }
    return {i: e for i, e in errors.items() if not e <= ALLOWED[dtype]}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name}, {dtype.name}": wrong(name, dtype)
                for name in [*CASES, "embedding"]
                for dtype in ALLOWED
            }
        )
    )
