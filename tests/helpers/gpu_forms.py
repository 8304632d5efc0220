"""Operations' GPU forms on OpenCL against the portable ones: prints JSON, per name what was wrong.

A process of its own: `DEV=CL POCL_MAX_PTHREAD_COUNT=1 python gpu_forms.py`.
"""

import json
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
from gpu_kernels import beyond
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.ops import cross_entropy, embedding, forms, rms_norm, rope, swiglu
from tinyllama.ops.cached_attention import LANES, Cache, cached_attention
from tinyllama.ops.sums import into_products
from tinyllama.runtime import blocks

BF16 = dtypes.bfloat16
RANDOM = np.random.default_rng(5)
ALLOWED = 1.5e-2  # of the largest number: bfloat16 has 8 bits, and the forms round at other places
IDS = RANDOM.integers(0, 70, (2, 40)).astype(np.int32)
TARGETS = np.concatenate([RANDOM.integers(0, 72, 30), [-1, -1]]).astype(np.int32)
COS, SIN = rope.tables(16, 10000.0, 6)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def loss(x: Tensor, w: Tensor) -> Tensor:
    return cross_entropy.linear_cross_entropy(x, w.float(), Tensor(TARGETS)).reshape(1)


def token_losses(x: Tensor, w: Tensor) -> Tensor:
    return cross_entropy.token_losses(x, w.float(), Tensor(TARGETS))


def embedded(w: Tensor) -> Tensor:
    return embedding.embedding(Tensor(IDS), w.float().contiguous(), BF16)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The third of three tokens, of which two are in the cache."""
    slots, position = 2 * LANES, Tensor([2], dtype=dtypes.int32)
    keys = Tensor(CACHED[0]).cast(BF16).contiguous().realize()
    values = Tensor(CACHED[1]).cast(BF16).contiguous().realize()
    assert values.shape[1] == slots
    out = cached_attention(q, k, v, Cache(keys, values), position)
    return Tensor.cat(out.flatten(), keys.flatten(), values.flatten())


CACHED = normal(2, 2, LANES, 16), normal(2, 2 * LANES, 16)
# Function, shapes of its arguments, whether it has gradients.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], bool]] = {
    "rms_norm": (lambda x, w: rms_norm.rms_norm(x, w, 1e-5), [(3, 4, 48), (48,)], True),
    "swiglu": (swiglu.swiglu, [(3, 40), (3, 40)], True),
    "rope": (lambda x: rope.rope(x, Tensor(COS), Tensor(SIN)), [(2, 6, 3, 16)], True),
    "loss": (loss, [(32, 16), (72, 16)], True),
    "token losses": (token_losses, [(32, 16), (72, 16)], False),
    "embedding": (embedded, [(70, 24)], True),
    "cached attention": (attended, [(1, 1, 4, 16), (1, 1, 2, 16), (1, 1, 2, 16)], False),
}


def results(
    form: forms.Form, function: Callable[..., Tensor], arrays: Sequence[np.ndarray], pulls: bool
) -> list[np.ndarray]:
    """The function's value and, if it has them, gradients, of `arrays` in bfloat16; vectors stay
    float32."""
    tensors = [
        Tensor(a).cast(BF16 if a.ndim > 1 else dtypes.float32).contiguous().realize()
        for a in arrays
    ]
    with forms.forced(form):
        out = function(*tensors)
        slope = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        grads = out.gradient(*tensors, gradient=Tensor(slope).cast(out.dtype)) if pulls else []
        return [t.contiguous().float().numpy() for t in (out, *grads)]


def compared(name: str) -> dict[str, float]:
    """How many kernels of ours ran, and errors of results, by number, that exceed rounding."""
    function, shapes, pulls = CASES[name]
    arrays = [normal(*shape) for shape in shapes]
    with mock.patch.object(blocks, "run", wraps=blocks.run) as run:
        found = results("gpu", function, arrays, pulls)
    wanted = results("portable", function, arrays, pulls)
    return {"kernels": run.call_count} | beyond(found, wanted, ALLOWED)


def with_residual() -> dict[str, float]:
    """The gradient of x + norm(x): the norm's kernel adds the residual's."""
    arrays, found = [normal(6, 48), normal(48)], {}
    tensors = [Tensor(a).realize() for a in arrays]
    slope = Tensor(normal(6, 48)).realize()
    for form in ("gpu", "portable"):
        with forms.forced(form):
            x, w = tensors
            out = x + rms_norm.rms_norm(x, w, 1e-5)
            found[form] = into_products(out.gradient(x, w, gradient=slope))
    calls = [u for u in found["gpu"][0].uop.sink(found["gpu"][1].uop).toposort()]
    result: dict[str, float] = {"sums": sum(u.op is Ops.ADD for u in calls)}
    result["kernels"] = sum(u.op is Ops.CALL for u in calls)
    got, wanted = ([t.numpy() for t in found[form]] for form in ("gpu", "portable"))
    return result | beyond(got, wanted, 2e-6)


if __name__ == "__main__":
    found = {name: compared(name) for name in CASES} | {"with a residual": with_residual()}
    print(json.dumps(found))
