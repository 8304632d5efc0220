"""Attention of the next tokens of a sequence to all so far, whose keys and values are kept.

    keys[position + t], values[position + t] = k[t], v[t]
    out[t] = softmax(q[t] keys^T / sqrt(D)) values      over positions <= position + t

The CPU kernels write the new rows and read the filled ones, nothing else. The portable form writes
the whole cache anew and masks what is not filled.

B sequences that each have one next token share a cache: the heads of all of them lie one after the
other in it, and each sequence has its own position.
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
from tinyllama.runtime.storage import fill_zero

LANES = 16  # of cpu/cache.h: a number of slots is a multiple of this
MOST_ON_STACK = 1 << 14  # numbers of a head: the CPU kernel has 8 of its rows on its stack, 512 KB


class Cache(NamedTuple):
    """keys (B * KV, S / LANES, D, LANES) and values (B * KV, S, D) of S slots of B sequences."""

    keys: Tensor
    values: Tensor


def new_cache(kv_heads: int, slots: int, head_dim: int, dtype: DType, sequences: int = 1) -> Cache:
    """An empty cache of `slots`, a multiple of LANES, for each of so many sequences."""
    kv_heads *= sequences
    shapes = (kv_heads, slots // LANES, head_dim, LANES), (kv_heads, slots, head_dim)
    keys, values = (Tensor.empty(*shape, dtype=dtype) for shape in shapes)
    for part in (keys, values):
        fill_zero(part)  # on the CPU without touching it: what is never filled takes no memory
    return Cache(keys, values)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None = None
) -> Tensor:
    """q (B, T, H, D), k and v (B, T, KV, D) at positions position .. -> (B, T, H, D) like q.

    B or T is 1. position is an int32 tensor (B,), so that one compiled step serves every position.
    The cache, which may hold more sequences than these, is updated in place. With a `window` a
    token attends to so many tokens, itself included.
    """
    cpu = _cpu if q.shape[-1] <= MOST_ON_STACK else _portable
    form = forms.choose(q, k, v, *cache, portable=_portable, cpu=cpu, gpu=_gpu)
    return form(q, k, v, cache, position, window)


def _portable(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    if q.shape[0] > 1:
        return _portable_rows(q, k, v, cache, position, window)
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


def _portable_rows(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    """One next token of each of B sequences."""
    B, _, _, D = q.shape
    KV, S = k.shape[2], cache.values.shape[1]
    places = position.reshape(B, 1, 1)
    slots = Tensor.arange(S, device=q.device).reshape(1, 1, S)

    def updated(part: Tensor, fresh: Tensor) -> Tensor:
        """part (every KV, S, D) with the new rows fresh (B, 1, KV, D)."""
        new = (slots == places).reshape(B, 1, S, 1)
        old = part[: B * KV].reshape(B, KV, S, D)
        rows = new.where(fresh.reshape(B, KV, 1, D), old).cast(part.dtype)
        return Tensor.cat(rows.reshape(B * KV, S, D), part[B * KV :])

    keys = updated(cache.keys.permute(0, 1, 3, 2).reshape(-1, S, D), k)
    blocks = keys.reshape(-1, S // LANES, LANES, D).permute(0, 1, 3, 2).contiguous()
    keys = cache.keys.assign(blocks).permute(0, 1, 3, 2).reshape(-1, S, D)
    values = cache.values.assign(updated(cache.values, v).contiguous())
    mask = slots <= places
    if window is not None:
        mask = mask & (slots > places - window)
    keys, values = (x[: B * KV].reshape(B, KV, S, D).transpose(1, 2) for x in (keys, values))
    return masked_attention(q, keys, values, mask)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, position: Tensor, window: int | None
) -> Tensor:
    B, T, H, D = q.shape
    KV, S = B * k.shape[2], cache.values.shape[1]
    defines: dict[str, int | str] = {"KV": KV, "D": D, "ACT": TYPE_CODE[q.dtype]}
    if B > 1:  # one row of B * H heads
        defines["SEQUENCES"] = B
    sizes = {"S": S, "T": T}
    writing = Kernel("cache_write.c", defines, sizes, ("cache.h",), updates=True)
    keys, values = run(writing, [*cache], [k, v, position])
    rows = 1 if T == 1 else 4
    defines |= {"H": B * H, "ROWS": rows, "WINDOW": window or 0, "SCALE": f"{1 / math.sqrt(D)!r}f"}
    sizes |= {"SCRATCH_FLOATS": rows * S}
    attending = Kernel("cached_attention.c", defines, sizes, ("cache.h",), 2 * B * T * H * D * S)
    written = [empty(B, T, H, D, dtype=q.dtype, device=q.device), per_thread(rows * S)]
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
