"""Cases of the GPU kernels beside products and attention, against float64.

A case is a function (run, dialect, change) -> the results that differ from the formula by more than
rounding, by name; see gpu_kernels for runners. `change` is applied to the kernels' texts.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
from gpu_kernels import Runner, error, loaded, packed_matrix, replaced, stored, unwritten

from tinyllama.ops.gpu import (
    adamw,
    attention,
    cached_attention,
    cross_entropy,
    embedding,
    few_rows,
    narrow,
    rms_norm,
    rope,
    swiglu,
)
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.runtime.blocks import Launch

Change = Callable[[str], str]
Case = Callable[[Runner, str, Change], dict[str, float]]
# Results in float32 (sums of some hundred numbers), and rounded to 8 and to 11 bits.
ALLOWED = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}


def wrong(found: Mapping[str, tuple[np.ndarray, np.ndarray]], dtype: str) -> dict[str, float]:
    """Those of the results (found, wanted) that differ by more than rounding to their type."""
    result = {}
    for name, (array, wanted) in found.items():
        allowed = ALLOWED["float32" if array.dtype == np.float32 else dtype]
        with np.errstate(invalid="ignore", over="ignore"):
            value = error(array, wanted)
        if not value <= allowed:
            result[name] = value
    return result


def start(run: Runner, launch: Launch, change: Change, *arrays: np.ndarray) -> None:
    run(replaced(launch, change), arrays)


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return stored(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def empty32(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def rms_norm_case(
    run: Runner,
    dialect: str,
    change: Change,
    N: int,
    H: int,
    dtype: str,
    addend: bool = False,
    blocks: int = rms_norm.MOST_BLOCKS,
) -> dict[str, float]:
    x, dy, other = (normal(i, N, H, dtype=dtype) for i in range(3))
    w, eps = normal(3, H), 1e-5
    y, rstd, dx = unwritten((N, H), dtype), empty32(N), unwritten((N, H), dtype)
    start(run, rms_norm.forward(dialect, N, H, dtype, eps), change, y, rstd, x, w)
    with mock.patch.object(rms_norm, "MOST_BLOCKS", blocks):
        backward = rms_norm.backward(dialect, N, H, dtype, addend=addend)
        partial, dw = empty32(rms_norm.partial_rows(N), H), empty32(H)
    inputs = [dy, x, rstd, w, *([other] if addend else [])]
    start(run, backward, change, dx, partial, *inputs)
    start(run, rms_norm.column_sum(dialect, len(partial), H), change, dw, partial)
    x64, dy64, w64 = loaded(x), loaded(dy), w.astype(np.float64)
    scale = 1 / np.sqrt((x64**2).mean(1, keepdims=True) + eps)
    n, dn = x64 * scale, dy64 * w64
    dx64 = scale * (dn - n * (dn * n).mean(1, keepdims=True)) + addend * loaded(other)
    found = {
        "y": (y, n * w64),
        "rstd": (rstd, scale[:, 0]),
        "dx": (dx, dx64),
        "dw": (dw, (dy64 * n).sum(0)),
    }
    return wrong(found, dtype)


def cross_entropy_case(
    run: Runner, dialect: str, change: Change, N: int, V: int, dtype: str, gradient: bool
) -> dict[str, float]:
    """Targets that are not trained, the last of the vocabulary, and one beyond it (loss NaN)."""
    logits = stored(6 * loaded(normal(0, N, V)), dtype)
    targets = np.random.default_rng(V).integers(0, V, N).astype(np.int32)
    targets[1], targets[2], targets[3] = -1, V - 1, V
    x, loss = loaded(logits), np.full(N, 7, np.float32)
    launch = cross_entropy.softmax_loss(dialect, N, V, dtype, gradient=gradient)
    before = logits.copy()
    start(run, launch, change, logits, loss, targets)
    beyond, loss[3] = not np.isnan(loss[3]), 0
    trained = (targets >= 0) & (targets < V)
    lse = np.logaddexp.reduce(x, 1)
    picked = x[np.arange(N), np.clip(targets, 0, V - 1)]
    found = {"loss": (loss, np.where(trained, lse - picked, 0))}
    if gradient:
        p = np.exp(x - lse[:, None])
        p[np.arange(N), np.clip(targets, 0, V - 1)] -= 1
        found["dlogits"] = (logits, p * trained[:, None])
    result = wrong(found, dtype)
    if not gradient and not np.array_equal(logits, before):
        result["logits"] = math.inf
    return result | ({"beyond": math.inf} if beyond else {})


def swiglu_case(
    run: Runner, dialect: str, change: Change, count: int, dtype: str
) -> dict[str, float]:
    gate, up, dy = (stored(3 * loaded(normal(i, count)), dtype) for i in range(3))
    y, dgate, dup = (unwritten((count,), dtype) for _ in range(3))
    start(run, swiglu.forward(dialect, count, dtype), change, y, gate, up)
    start(run, swiglu.backward(dialect, count, dtype), change, dgate, dup, dy, gate, up)
    g, u, d = map(loaded, (gate, up, dy))
    s = 1 / (1 + np.exp(-g))
    found = {
        "y": (y, g * s * u),
        "dgate": (dgate, d * u * s * (1 + g * (1 - s))),
        "dup": (dup, d * g * s),
    }
    return wrong(found, dtype)


def rope_case(
    run: Runner, dialect: str, change: Change, B: int, T: int, H: int, D: int, dtype: str
) -> dict[str, float]:
    x = normal(0, B, T, H, D, dtype=dtype)
    angles = np.random.default_rng(T).uniform(0, 7, (T, D // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    y, back = unwritten(x.shape, dtype), unwritten(x.shape, dtype)
    start(run, rope.rope(dialect, B, T, H, D, dtype), change, y, x, cos, sin)
    start(run, rope.rope(dialect, B, T, H, D, dtype, inverse=True), change, back, x, cos, sin)

    def turned(sign: int) -> np.ndarray:
        first, second = np.split(loaded(x), 2, -1)
        c, s = (t.astype(np.float64)[:, None] for t in (cos, sign * sin))
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    return wrong({"y": (y, turned(1)), "back": (back, turned(-1))}, dtype)


def attention_delta_case(
    run: Runner, dialect: str, change: Change, B: int, T: int, H: int, D: int, dtype: str
) -> dict[str, float]:
    dout, out = (normal(i, B, T, H, D, dtype=dtype) for i in range(2))
    found = empty32(B, H, T)
    start(run, attention.delta(dialect, B, T, H, D, dtype), change, found, dout, out)
    return wrong({"delta": (found, (loaded(dout) * loaded(out)).sum(-1).swapaxes(1, 2))}, dtype)


def embedding_case(
    run: Runner, dialect: str, change: Change, N: int, V: int, H: int, dtype: str
) -> dict[str, float]:
    """Half of the tokens are one id, some entries have none."""
    rng = np.random.default_rng(N)
    ids = np.where(rng.random(N) < 0.5, V // 3, rng.integers(0, V, N)).astype(np.int32)
    ids[:2] = 0, V - 1
    dout = normal(0, N, H, dtype=dtype)
    order, in_order, dw = np.zeros(N, np.int32), np.zeros(N, np.int32), empty32(V, H)
    start(run, embedding.order(dialect, N, V), change, order, in_order, ids)
    start(run, embedding.backward(dialect, N, V, H, dtype), change, dw, dout, order, in_order)
    wanted = np.zeros((V, H))
    np.add.at(wanted, ids, loaded(dout))
    result = wrong({"dw": (dw, wanted)}, dtype)
    stable = np.argsort(ids, kind="stable")
    if not (np.array_equal(order, stable) and np.array_equal(in_order, ids[stable])):
        result["order"] = math.inf
    return result


def adamw_case(
    run: Runner, dialect: str, change: Change, counts: Sequence[int], dtype: str
) -> dict[str, float]:
    """Two steps of parameters of which the first does not decay; the norm of their gradients."""
    decays = [number > 0 for number in range(len(counts))]
    scalars = np.array([0.3, 0.9, 0.99, 1e-8, 0.1, 0.19, 0.0199, 0.5], np.float32)
    lr, beta1, beta2, eps, weight_decay, first, second, scale = scalars.astype(np.float64)
    p = [normal(0, count) for count in counts]
    m = [normal(1, count) for count in counts]
    v = [np.square(normal(2, count)) for count in counts]
    g = [normal(3, count, dtype=dtype) for count in counts]
    p64, m64, v64, g64 = ([loaded(x) for x in group] for group in (p, m, v, g))
    with mock.patch.object(adamw, "NORM_BLOCKS", 2):
        parts = empty32(adamw.NORM_BLOCKS)
        start(run, adamw.square_sum(dialect, counts, dtype), change, parts, *g)
        once = adamw.square_sum(dialect, counts[:1], dtype, accumulate=True)
    start(run, once, change, parts, g[0])
    states = [array for triple in zip(p, m, v, strict=True) for array in triple]
    launch = adamw.step(dialect, counts, decays, dtype)
    start(run, launch, change, *states, *g, scalars)
    found = {}
    for i, decay in enumerate(decays):
        x = g64[i] * scale
        m64[i] += (1 - beta1) * (x - m64[i])
        v64[i] = beta2 * v64[i] + (1 - beta2) * x * x
        size = np.sqrt(v64[i]) / math.sqrt(second) + eps
        p64[i] = p64[i] - lr * weight_decay * decay * p64[i] - lr / first * m64[i] / size
        found |= {f"p{i}": (p[i], p64[i]), f"m{i}": (m[i], m64[i]), f"v{i}": (v[i], v64[i])}
    squares = sum((x**2).sum() for x in g64) + (g64[0] ** 2).sum()
    found["squares"] = (parts.astype(np.float64).sum(keepdims=True), squares.reshape(1))
    return wrong(found, "float32")


def adamw_copies_case(
    run: Runner, dialect: str, change: Change, counts: Sequence[int], copy: str
) -> dict[str, float]:
    """Copies of every other parameter are its new numbers, rounded; those of a step that is left
    out stay."""
    copied = range(0, len(counts), 2)
    p = [normal(0, count) for count in counts]
    m, v = ([np.zeros(count, np.float32) for count in counts] for _ in range(2))
    c = [unwritten((counts[n],), copy) for n in copied]
    g = [normal(3, count) for count in counts]
    states = [array for triple in zip(p, m, v, strict=True) for array in triple]
    copies = [number in copied for number in range(len(counts))]
    launch = adamw.step(dialect, counts, [True] * len(counts), copies=copies, copy=copy)
    found = {}
    for scale in (0.0, 0.5):
        scalars = np.array([0.3, 0.9, 0.99, 1e-8, 0.1, 0.19, 0.0199, scale], np.float32)
        start(run, launch, change, *states, *c, *g, scalars)
        for number, array in zip(copied, c, strict=True):
            wanted = stored(p[number], copy) if scale else unwritten(array.shape, copy)
            same = array.tobytes() == wanted.tobytes()
            found |= {} if same else {f"copy {number} of {scale}": math.inf}
    return found


def adamw_state_case(
    run: Runner, dialect: str, change: Change, counts: Sequence[int]
) -> dict[str, float]:
    """The state in bfloat16, bit for bit: with halves for the betas a step is exact before it is
    rounded."""
    key, random = (1234567, 7654321), np.random.default_rng(0)
    scalars = np.array([0.5, 0.5, 0.5, 1e-8, 0.1, 0.5, 0.5, 1.0, *key], np.float32)
    firsts = np.array([5, *counts[:-1]], np.uint32)
    p = [normal(0, count) for count in counts]
    m = [stored(random.integers(-64, 64, count) / 16, "bfloat16") for count in counts]
    v = [stored(random.integers(0, 64, count) / 16, "bfloat16") for count in counts]
    g = [(random.integers(-512, 512, count) / 256).astype(np.float32) for count in counts]
    wanted = []
    for i, x in enumerate(g):
        bits = hashed(firsts[i] + np.arange(len(x)), key)
        exact = [(loaded(m[i]) + x) / 2, (loaded(v[i]) + x * x) / 2]
        halves = [array.astype(np.float32).view(np.uint32) for array in exact]
        wanted.append([(halves[0] + (bits & 0xFFFF)) >> 16, (halves[1] + (bits >> 16)) >> 16])
    launch = adamw.step(dialect, counts, [True] * len(counts), state="bfloat16")
    states = [array for triple in zip(p, m, v, strict=True) for array in triple]
    start(run, launch, change, *states, *g, scalars, firsts)
    found = {}
    for i, (mean, square) in enumerate(wanted):
        found |= {} if (m[i] == mean).all() else {f"m{i}": math.inf}
        found |= {} if (v[i] == square).all() else {f"v{i}": math.inf}
    return found


def hashed(indices: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """The random bits of indices, by the definition in ops/random_bits.py."""
    bits = indices.astype(np.uint64)
    for word in key:
        bits ^= np.uint64(word)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> np.uint64(shift)) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
        bits ^= bits >> np.uint64(16)
    return bits.astype(np.uint32)


def narrow_case(
    run: Runner, dialect: str, change: Change, counts: Sequence[int], dtype: str
) -> dict[str, float]:
    """Rounded to nearest even, to the last bit."""
    x = [normal(0, count) for count in counts]
    y = [unwritten((count,), dtype) for count in counts]
    start(run, narrow.narrow(dialect, counts, dtype), change, *y, *x)
    return {
        f"y{i}": math.inf
        for i, (a, b) in enumerate(zip(y, x, strict=True))
        if not np.array_equal(a, stored(b, dtype))
    }


def few_rows_case(
    run: Runner,
    dialect: str,
    change: Change,
    R: int,
    N: int,
    K: int,
    dtype: str,
    weight: Any,
    addend: bool = False,
    fill: int | None = None,
) -> dict[str, float]:
    """fill: replaces GROUPS_TO_FILL, so that small sizes take the form of large ones."""
    x, added = normal(0, R, K, dtype=dtype), normal(1, R, N, dtype=dtype)
    if isinstance(weight, Packed):
        arguments, w = packed_matrix(N, K, weight, np.random.default_rng(K))
    else:
        arguments = [normal(2, N, K, dtype=weight)]
        w = loaded(arguments[0])
    y = unwritten((R, N), dtype)
    with mock.patch.object(few_rows, "GROUPS_TO_FILL", fill or few_rows.GROUPS_TO_FILL):
        launch = few_rows.product(dialect, R, N, K, dtype, weight, addend=addend)
    start(run, launch, change, y, x, *arguments, *([added] if addend else []))
    return wrong({"y": (y, loaded(x) @ w.T + addend * loaded(added))}, dtype)


def cached_attention_case(
    run: Runner,
    dialect: str,
    change: Change,
    S: int,
    H: int,
    KV: int,
    D: int,
    dtype: str,
    positions: Sequence[int],
    window: int | None = None,
) -> dict[str, float]:
    """What the cache holds past a position is not a number."""
    result: dict[str, float] = {}
    launches = [
        cached_attention.parts(dialect, S, H, KV, D, dtype, window),
        cached_attention.joined(dialect, S, H, KV, D, dtype),
    ]
    for at in positions:
        keys, values = (normal(i, KV, S, D, dtype=dtype) for i in (4, 5))
        keys[:, at:] = values[:, at:] = stored(np.float32([np.nan]), dtype)
        q, k, v = (normal(i, n, D, dtype=dtype) for i, n in ((1, H), (2, KV), (3, KV)))
        parts = empty32(H, cached_attention.blocks(S), D + 2)
        out, position = unwritten((H, D), dtype), np.array([at], np.int32)
        wanted = [loaded(keys), loaded(values)]
        wanted[0][:, at], wanted[1][:, at] = loaded(k), loaded(v)
        by_lanes = np.ascontiguousarray(keys.reshape(KV, S // 16, 16, D).swapaxes(2, 3))
        start(run, launches[0], change, by_lanes, values, parts, q, k, v, position)
        start(run, launches[1], change, out, parts, position)
        keys = by_lanes.swapaxes(2, 3).reshape(KV, S, D)
        cached = zip((keys, values), wanted, strict=True)
        kept = all(np.array_equal(loaded(a), b, equal_nan=True) for a, b in cached)
        begin = max(0, at + 1 - (window or S))
        seen = [np.repeat(x[:, begin : at + 1], H // KV, 0) for x in wanted]
        scores = np.einsum("hd,hsd->hs", loaded(q), seen[0]) / math.sqrt(D)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        found = wrong({"out": (out, np.einsum("hs,hsd->hd", p, seen[1]))}, dtype)
        if not kept:
            found["cache"] = math.inf
        result |= {f"{name} at {at}": value for name, value in found.items()}
    return result


# What is run in every dialect. Sizes are small, and of each kind one that nothing divides.
CASES: dict[str, Case] = {
    name: functools.partial(globals()[f"{name.partition(':')[0].replace(' ', '_')}_case"], **sizes)
    for name, sizes in {
        "rms norm: float32": {"N": 5, "H": 256, "dtype": "float32"},
        "rms norm: odd rows": {"N": 3, "H": 99, "dtype": "float32", "addend": True},
        "rms norm: bfloat16, several per thread": {"N": 3, "H": 4608, "dtype": "bfloat16"},
        "rms norm: float16, more rows than blocks": {
            "N": 7, "H": 40, "dtype": "float16", "addend": True, "blocks": 3,
        },
        "cross entropy: float32": {"N": 6, "V": 515, "dtype": "float32", "gradient": True},
        "cross entropy: bfloat16": {"N": 6, "V": 4104, "dtype": "bfloat16", "gradient": True},
        "cross entropy: float16, odd": {"N": 5, "V": 1031, "dtype": "float16", "gradient": True},
        "cross entropy: without gradient": {
            "N": 5, "V": 72, "dtype": "bfloat16", "gradient": False,
        },
        "swiglu: float32": {"count": 1028, "dtype": "float32"},
        "swiglu: bfloat16": {"count": 4096, "dtype": "bfloat16"},
        "swiglu: float16, odd": {"count": 331, "dtype": "float16"},
        "rope: float32": {"B": 2, "T": 3, "H": 2, "D": 32, "dtype": "float32"},
        "rope: bfloat16": {"B": 1, "T": 9, "H": 8, "D": 64, "dtype": "bfloat16"},
        "rope: float16, odd": {"B": 2, "T": 5, "H": 3, "D": 6, "dtype": "float16"},
        "attention delta: float32": {"B": 2, "T": 9, "H": 3, "D": 80, "dtype": "float32"},
        "attention delta: bfloat16": {"B": 1, "T": 40, "H": 2, "D": 64, "dtype": "bfloat16"},
        "embedding: float32": {"N": 300, "V": 97, "H": 40, "dtype": "float32"},
        "embedding: bfloat16": {"N": 257, "V": 64, "H": 264, "dtype": "bfloat16"},
        "embedding: float16, odd": {"N": 31, "V": 129, "H": 33, "dtype": "float16"},
        "adamw: float32": {"counts": (40, 4096, 5000), "dtype": "float32"},
        "adamw: bfloat16, odd": {"counts": (7, 1030), "dtype": "bfloat16"},
        "adamw copies: bfloat16": {"counts": (40, 4096, 5000), "copy": "bfloat16"},
        "adamw copies: float16, odd": {"counts": (7, 1030), "copy": "float16"},
        "adamw state: bfloat16": {"counts": (40, 4096, 5000)},
        "adamw state: odd": {"counts": (7, 1030)},
        "narrow: bfloat16": {"counts": (40, 4096, 5000), "dtype": "bfloat16"},
        "narrow: float16, odd": {"counts": (7, 1030), "dtype": "float16"},
        "few rows: float32": {
            "R": 1, "N": 37, "K": 260, "dtype": "float32", "weight": "float32", "addend": True,
        },
        "few rows: bfloat16": {
            "R": 3, "N": 50, "K": 520, "dtype": "bfloat16", "weight": "bfloat16", "fill": 5,
        },
        "few rows: float16, odd": {
            "R": 8, "N": 9, "K": 77, "dtype": "float16", "weight": "float16", "fill": 2,
        },
        "few rows: bfloat16 times float32": {
            "R": 2, "N": 20, "K": 132, "dtype": "bfloat16", "weight": "float32", "addend": True,
        },
        "few rows: float32 times bfloat16": {
            "R": 1, "N": 130, "K": 136, "dtype": "float32", "weight": "bfloat16", "fill": 4,
        },
        "few rows: 4 bits by 64": {
            "R": 1, "N": 70, "K": 1152, "dtype": "bfloat16", "weight": Packed(4, 64), "fill": 4,
        },
        "few rows: 4 bits by 32, minimum": {
            "R": 8, "N": 21, "K": 96, "dtype": "float32", "weight": Packed(4, 32, True), "fill": 2,
        },
        "few rows: 8 bits by 32": {
            "R": 2, "N": 33, "K": 608, "dtype": "float32", "weight": Packed(8, 32), "addend": True,
        },
        "few rows: 8 bits by 64, minimum": {
            "R": 5, "N": 10, "K": 192, "dtype": "float16", "weight": Packed(8, 64, True),
        },
        "cached attention: float32": {
            "S": 304, "H": 4, "KV": 2, "D": 32, "dtype": "float32", "positions": (0, 127, 128, 303),
        },
        "cached attention: bfloat16": {
            "S": 144, "H": 12, "KV": 4, "D": 64, "dtype": "bfloat16", "positions": (130,),
        },
        "cached attention: a window": {
            "S": 304, "H": 2, "KV": 1, "D": 16, "dtype": "float32", "positions": (3, 160, 303),
            "window": 40,
        },
        "cached attention: float16, D 80": {
            "S": 64, "H": 8, "KV": 1, "D": 80, "dtype": "float16", "positions": (63,),
        },
    }.items()
}  # fmt: skip


def same(text: str) -> str:
    return text
