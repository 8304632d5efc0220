"""How attention of one new token over a cache is launched on a GPU: see cached_attention.c."""

import math

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, UnsupportedSize, itemsize

PART = 128  # slots per block
MOST_HEADS = 8  # query heads that share a key


def parts(
    dialect: Dialect,
    S: int,
    H: int,
    KV: int,
    D: int,
    dtype: DType,
    window: int | None = None,
) -> Launch:
    """The cache of S slots (ops/cached_attention.py), updated, and parts (H, blocks(S), D + 2)
    float32, from q (H, D), k and v (KV, D) and position (1,) int32. A token
    sees `window` keys, its own the last of them.

    Raises UnsupportedSize for heads that the kernel does not take.
    """
    shared = H // KV
    vec = rows.vector(itemsize(dtype), D)
    if H % KV or shared > MOST_HEADS:
        raise UnsupportedSize(f"{H} heads for {KV} of keys: at most {MOST_HEADS} may share one")
    if D > PART or D % 8:
        raise UnsupportedSize(f"head_dim {D}: allowed are multiples of 8 up to {PART}")
    macros = _macros(S, H, KV, D, "PARTS") | {"WINDOW": min(window or S, S)}
    sums = (PART + D // vec) * vec
    return rows.launch(
        "cached_attention", dialect, macros, vec=vec, grid=(blocks(S), KV),
        dtype=dtype, threads=PART, arguments=("keys", "values", "parts", "q", "k", "v", "position"),
        flops=4 * S * H * D, shared=PART + shared * (D + PART) + sums, updates=True,
        products=(KV * D, shared * blocks(S) * (D + 2)),
    )  # fmt: skip


def joined(dialect: Dialect, S: int, H: int, KV: int, D: int, dtype: DType) -> Launch:
    """out (H, D) from parts (H, blocks(S), D + 2) and position (1,)."""
    return rows.launch(
        "cached_attention", dialect, _macros(S, H, KV, D, "JOINED"),
        vec=rows.vector(itemsize(dtype), D), grid=(H, 1), dtype=dtype, threads=PART,
        arguments=("out", "parts", "position"), flops=4 * H * blocks(S) * D,
        products=(blocks(S) * (D + 2),),
    )  # fmt: skip


def blocks(S: int) -> int:
    """Parts into which a cache of S slots is cut."""
    return -(-S // PART)


def _macros(S: int, H: int, KV: int, D: int, which: str) -> dict[str, int | str]:
    return {
        "S": S, "KV": KV, "HEADS": H // KV, "D": D, "SCALE": f"{1 / math.sqrt(D)!r}f",
        "PASS": which, "BLOCKS": blocks(S),
    }  # fmt: skip
