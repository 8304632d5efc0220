"""Attention of the next tokens of one sequence to all so far, whose keys and values are kept.

    keys[position + t], values[position + t] = k[t], v[t]
    out[t] = softmax(q[t] keys^T / sqrt(D)) values      over positions <= position + t

The CPU kernels write the new rows and read the filled ones, nothing else. The portable form writes
the whole cache anew and masks what is not filled.
"""

import math
from typing import NamedTuple

from tinygrad import Tensor
from tinygrad.dtype import DType

from tinyllama.ops import forms
from tinyllama.ops.attention import masked_attention
from tinyllama.ops.gpu import cached_attention as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import TYPE_CODE, empty, empty_like

LANES = 16  # of cpu/cache.h: a number of slots is a multiple of this


class Cache(NamedTuple):
    """keys (KV, S / LANES, D, LANES) and values (KV, S, D) of S slots."""

    keys: Tensor
    values: Tensor


def new_cache(kv_heads: int, slots: int, head_dim: int, dtype: DType) -> Cache:
    """An empty cache of `slots`, a multiple of LANES."""
    shapes = (kv_heads, slots // LANES, head_dim, LANES), (kv_heads, slots, head_dim)
    return Cache(*(Tensor.zeros(*s, dtype=dtype).contiguous().realize() for s in shapes))


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None = None
) -> Tensor:
    """q (1, T, H, D), k and v (1, T, KV, D) at positions position .. -> (1, T, H, D) like q.

    position is an int32 tensor (1,), so that one compiled step serves every position. The cache is
    updated in place. With a `window` a token attends to so many tokens, itself included.
    """
    form = forms.choose(q, k, v, *cache, portable=_portable, cpu=_cpu, gpu=_gpu)
    return form(q, k, v, cache, position, window)


def _portable(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    T, (KV, S, D) = q.shape[1], cache.values.shape
    slots = Tensor.arange(S, device=q.device)
    index = (slots - position).clip(0, T - 1)
    inside = ((slots >= position) & (slots < position + T)).reshape(1, S, 1)
    fresh_keys, fresh_values = (x[0][index].permute(1, 0, 2) for x in (k, v))  # (KV, S, D)
    keys = cache.keys.permute(0, 1, 3, 2).reshape(KV, S, D)
    keys = inside.where(fresh_keys, keys).cast(k.dtype)
    blocks = keys.reshape(KV, S // LANES, LANES, D).permute(0, 1, 3, 2).contiguous()
    blocks = cache.keys.assign(blocks)
    keys = blocks.permute(0, 1, 3, 2).reshape(KV, S, D)
    values = cache.values.assign(inside.where(fresh_values, cache.values).contiguous())
    queries = position.reshape(1, 1) + Tensor.arange(T, device=q.device).reshape(T, 1)
    mask = slots.reshape(1, S) <= queries
    if window is not None:
        mask = mask & (slots.reshape(1, S) > queries - window)
    all_keys, all_values = (x.permute(1, 0, 2).unsqueeze(0) for x in (keys, values))
    return masked_attention(q, all_keys, all_values, mask.reshape(1, T, S))


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    _, T, H, D = q.shape
    KV, S, _ = cache.values.shape
    defines: dict[str, int | str] = {"KV": KV, "D": D, "ACT": TYPE_CODE[q.dtype]}
    sizes = {"S": S, "T": T}
    writing = Kernel("cache_write.c", defines, sizes, ("cache.h",), updates=True)
    keys, values = run(writing, [*cache], [k, v, position])
    rows = 1 if T == 1 else 4
    defines |= {"H": H, "ROWS": rows, "WINDOW": window or 0, "SCALE": f"{1 / math.sqrt(D)!r}f"}
    sizes |= {"SCRATCH_FLOATS": rows * S}
    attending = Kernel("cached_attention.c", defines, sizes, ("cache.h",), 2 * T * H * D * S)
    written = [empty(1, T, H, D, dtype=q.dtype, device=q.device), per_thread(rows * S)]
    return run(attending, written, [q, keys, values, position])[0]


def _gpu(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    B, T, H, D = q.shape
    KV, S = cache.values.shape[:2]
    if B * T != 1:
        raise UnsupportedSize(f"{B} x {T} new tokens: the kernel takes one")
    dialect, dtype = blocks.language(q)
    launch = gpu.parts(dialect, S, H, KV, D, dtype, window)
    outputs = [*cache, empty(H, gpu.blocks(S), D + 2, device=q.device)]
    parts = blocks.run(launch, outputs, [q, k, v, position])[2]
    joined = gpu.joined(dialect, S, H, KV, D, dtype)
    return blocks.run(joined, empty_like(q), [parts, position])[0]
