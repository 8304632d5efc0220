"""Attention of new tokens of one sequence over a cache of the keys and values before them.

The portable form writes the whole cache anew and attends to all of it. On a GPU, where generation
takes as long as reading the weights and the cache does, one new token has kernels of its own.
"""

from tinygrad import Tensor

from tinyllama.ops import forms
from tinyllama.ops.attention import masked_attention
from tinyllama.ops.gpu import cached_attention as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.kernel import empty, empty_like


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: Tensor, window: int | None = None
) -> Tensor:
    """q (1, T, H, D), k and v (1, T, KV, D), cache (2, 1, S, KV, D) -> (1, T, H, D) like q.

    The tokens stand at positions position, position + 1, ... and see the keys up to their own, of
    which the last `window`. Their keys and values are put into the cache, in place; position is an
    int32 tensor (1,), so that one compiled step serves every position.
    """
    form = forms.choose(q, k, v, cache, portable=_portable, cpu=_portable, gpu=_gpu)
    return form(q, k, v, cache, position, window)


def _portable(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: Tensor, window: int | None
) -> Tensor:
    T, S = q.shape[1], cache.shape[2]
    slots = Tensor.arange(S, device=q.device)
    fresh = slots.reshape(1, 1, S, 1, 1) - position.reshape(1, 1, 1, 1, 1)  # index into k, v
    pair = Tensor.stack(k, v)  # (2, 1, T, KV, D)
    placed = pair if T == S else _scatter_rows(pair, slots, position)
    inside = (fresh >= 0) & (fresh < T)
    keys_values = cache.assign(inside.where(placed, cache).cast(cache.dtype).contiguous())
    queries = position.reshape(1, 1) + Tensor.arange(T, device=q.device).reshape(T, 1)
    mask = slots.reshape(1, S) <= queries
    if window is not None and window < S:
        mask = mask & (slots.reshape(1, S) > queries - window)
    return masked_attention(q, keys_values[0], keys_values[1], mask.reshape(1, T, S))


def _scatter_rows(pair: Tensor, slots: Tensor, position: Tensor) -> Tensor:
    """pair (2, 1, T, KV, D) laid at slots position, position + 1, ...: (2, 1, S, KV, D)."""
    T = pair.shape[2]
    index = (slots - position).clip(0, T - 1)
    return pair.permute(2, 0, 1, 3, 4)[index].permute(1, 2, 0, 3, 4)


def _gpu(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: Tensor, window: int | None
) -> Tensor:
    B, T, H, D = q.shape
    S, KV = cache.shape[2:4]
    if B * T != 1:
        raise UnsupportedSize(f"{B} x {T} new tokens: the kernel takes one")
    dialect, dtype = blocks.language(q)
    parts = gpu.parts(dialect, S, H, KV, D, dtype, window)
    joined = gpu.joined(dialect, S, H, KV, D, dtype)
    outputs = [cache, empty(H, gpu.blocks(S), D + 2, device=q.device)]
    _, written = blocks.run(parts, outputs, [q, k, v, position])
    return blocks.run(joined, empty_like(q), [written, position])[0]
