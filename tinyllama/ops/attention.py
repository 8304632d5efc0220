"""Causal attention within documents (flash attention, Dao et al. 2022).

    S = q k^T / sqrt(D),  P = softmax(S) over starts[t] <= s <= t,  out = P v

`starts` keeps documents that are packed into one row from attending to each other. With
grouped-query attention, H query heads share KV key/value heads, H / KV each. The kernels save only
out and the log-sum-exp of S; no T x T matrix exists. The portable form computes S and P of one
layer at a time, and computes them again for the gradient. Backward (delta = rowsum(dout out)):
    dv = P^T dout,  dS = P (dout v^T - delta),  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D)

CPU kernels multiply in float32. With AMX they multiply bfloat16 q, k and v as they are, and round P
and dS to bfloat16 for it.
"""

import math

from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.gpu import attention as gpu
from tinyllama.ops.rope import rope, turned_for_attention
from tinyllama.runtime import blocks, c_kernel
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like
from tinyllama.runtime.stage import recomputed
from tinyllama.system import device

Rotation = tuple[Tensor, Tensor]
# Sizes of a head whose products AMX computes; a block of it holds 32 numbers of a head.
AMX_HEAD_DIMS = range(32, 129)


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rotation: Rotation | None = None
) -> Tensor:
    """q (B, T, H, D), k and v (B, T, KV, D), starts (B, T) integers -> (B, T, H, D) like q.

    With `rotation`, cos and sin (T, D/2) float32, q and k are first turned by it (rope.py).
    """
    form = forms.choose(q, k, v, portable=_portable, cpu=_cpu, gpu=_gpu)
    return form(q, k, v, starts.cast(dtypes.int32), rotation)


def _portable(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rotation: Rotation | None) -> Tensor:
    q, k = _turned(q, k, rotation)
    T = q.shape[1]
    position = Tensor.arange(T, device=q.device)
    keys, queries = position.reshape(1, 1, T), position.reshape(1, T, 1)
    mask = (keys <= queries) & (keys >= starts.reshape(*starts.shape, 1))  # (B, T, T)
    return masked_attention(q, k, v, mask)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The portable form for any mask: q (B, T, H, D), k, v (B, S, KV, D), mask (B, T, S) bool."""
    B, T, H, D = q.shape
    S, KV = k.shape[1], k.shape[2]
    heads = q.reshape(B, T, KV, H // KV, D).permute(0, 2, 3, 1, 4)  # (B, KV, H/KV, T, D)
    keys = k.permute(0, 2, 3, 1).reshape(B, KV, 1, D, S)
    values = v.permute(0, 2, 1, 3).reshape(B, KV, 1, S, D)
    scores = (heads.contiguous() @ keys.contiguous()).float() / math.sqrt(D)
    scores = mask.reshape(B, 1, 1, T, S).where(scores, -math.inf)
    weights = recomputed(scores.contiguous()).softmax(-1).cast(q.dtype)
    out = recomputed(weights.contiguous()) @ values.contiguous()  # (B, KV, H/KV, T, D)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, D).contiguous()


def _turned(q: Tensor, k: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    return (q, k) if rotation is None else (rope(q, *rotation), rope(k, *rotation))


def _cpu(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rotation: Rotation | None) -> Tensor:
    q, k = _turned(q, k, rotation)
    B, T, H, D = q.shape
    defines: dict[str, int | str] = {"B": B, "T": T, "H": H, "KV": k.shape[2], "D": D}
    defines |= {"SCALE": f"{1 / math.sqrt(D)!r}f", "ACT": TYPE_CODE[q.dtype]}
    form, headers, scratch_floats = "", ["attention.h"], _scratch_floats
    packed = {"forward": (2, 3, 1), "backward": (4, 5, 2)}
    if q.dtype == dtypes.bfloat16 and D in AMX_HEAD_DIMS and c_kernel.has_amx():
        defines["TILE_AMX"] = 1
        form, scratch_floats = "_amx", _scratch_floats_amx
        headers += ["pairs.h", "amx.h", "attention_amx.h"]
        packed = {"forward": (2, 5, 3), "backward": (7, 8, 7)}
    pairs = B * H * T * (T + 1) // 2  # query-key pairs that causality allows
    forward = Kernel(f"attention_forward{form}.c", defines, headers=headers, flops=4 * D * pairs)
    backward = Kernel(f"attention_backward{form}.c", defines, headers=headers, flops=10 * D * pairs)

    def gradient(dout: Tensor, call: Call) -> list[Tensor | None]:
        out, lse, _ = call.outputs
        q, k, v, starts = call.inputs
        grads = [empty(*t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        scratch = empty(scratch_floats(T, D, *packed["backward"]), device=q.device)
        inputs = [dout, out, lse, q, k, v, starts]
        dq, dk, dv, _ = run(backward, [*grads, scratch], inputs)
        return [dq, dk, dv, None]

    scratch = empty(scratch_floats(T, D, *packed["forward"]), device=q.device)
    out = empty(B, T, H, D, dtype=q.dtype, device=q.device)
    outputs = [out, empty(B, H, T, device=q.device), scratch]
    return run(forward, outputs, [q, k, v, starts], gradient)[0]


def _gpu(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rotation: Rotation | None) -> Tensor:
    B, T, H, D = q.shape
    (dialect, dtype), limits = blocks.language(q), blocks.limits_of(q.device)
    turned = rotation is not None
    forward, gradient_q, gradient_kv = (
        gpu.attention(dialect, which, B, T, H, k.shape[2], D, dtype, turned=turned, limits=limits)
        for which in gpu.PASSES
    )
    gradient_delta = gpu.delta(dialect, B, T, H, D, dtype)

    def gradient(dout: Tensor, call: Call) -> list[Tensor | None]:
        out, lse = call.outputs
        q, k, v, *places = call.inputs
        delta = blocks.run(gradient_delta, empty_like(lse), [dout, out])[0]
        inputs = [q, k, v, dout, lse, delta, *places]
        dq = blocks.run(gradient_q, empty_like(q), inputs)[0]
        dk, dv = blocks.run(gradient_kv, empty_like(k, v), inputs)
        return [dq, dk, dv, *[None for _ in places]]

    outputs = [*empty_like(q), empty(B, H, T, device=q.device)]
    if rotation is not None:
        q, k = (turned_for_attention(x, *rotation) for x in (q, k))
    return blocks.run(forward, outputs, [q, k, v, starts, *(rotation or ())], gradient)[0]


def _scratch_floats(T: int, D: int, sequences: int, tiles: int, scores: int) -> int:
    """Floats of packed tiles that all threads need, on any instruction set (cpu/attention.h)."""
    tile = 96
    rows = tile * (-(-D // 32) * 32 + 16)
    sequence = -(-T // tile) * rows
    return device.threads() * (sequences * sequence + tiles * rows + scores * tile * tile) + 16


def _scratch_floats_amx(T: int, D: int, sequences: int, tiles: int, scores: int) -> int:
    """The same in AMX, where tiles and half the scores of a tile are bfloat16 (attention_amx.h)."""
    tile = 96
    packed = tile // 2 * (-(-D // 32) * 32)
    sequence = -(-T // tile) * packed
    halves = scores * (tile // 2) * tile
    return device.threads() * (sequences * sequence + tiles * packed + halves) + 16
