"""How the passes of attention are launched on a GPU: see attention.c.

forward      out, lse, q, k, v, starts
gradient_q   dq, q, k, v, dout, lse, delta, starts
gradient_kv  dk, dv, q, k, v, dout, lse, delta, starts
with delta = (dout * out).sum(-1) as (B, H, T) float32, see delta.c; with `turned`, all have cos and
sin after them
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from tinyllama.ops.gpu import rows
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import (
    FMA,
    LIMITS,
    MMA16,
    TF32X3,
    Dialect,
    DType,
    Launch,
    Limits,
    UnsupportedSize,
    fragments,
    itemsize,
)

Pass = Literal["forward", "gradient_q", "gradient_kv"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a pass of attention is cut up; see ops/gpu/attention.c."""

    own_rows: int = 64  # rows per block: 16 per group of 32 lanes
    tile: int = 64  # rows of the other side that are copied at once
    buffers: int = 2
    blocks: int = 2  # per multiprocessor, at least

    @property
    def threads(self) -> int:
        return 2 * self.own_rows


PASSES: Mapping[Pass, tuple[str, int, tuple[str, ...]]] = {  # PASS, own tiles, arguments
    "forward": ("FORWARD", 1, ("out", "lse", "q", "k", "v", "starts")),
    "gradient_q": (
        "GRADIENT_Q", 2, ("dq", "q", "k", "v", "dout", "lse", "delta", "starts"),
    ),
    "gradient_kv": (
        "GRADIENT_KV", 2, ("dk", "dv", "q", "k", "v", "dout", "lse", "delta", "starts"),
    ),
}  # fmt: skip


def attention(
    dialect: Dialect,
    which: Pass,
    B: int,
    T: int,
    H: int,
    KV: int,
    D: int,
    dtype: DType,
    *,
    turned: bool = False,
    cut: Cut | None = None,
    limits: Limits | None = None,
) -> Launch:
    """The launch of one pass of attention, see ops/gpu/attention.c for its formula and arguments.

    q, dout, out, dq (B, T, H, D) and k, v, dk, dv (B, T, KV, D) have type `dtype`; lse and delta
    (B, H, T) are float32, starts (B, T) int32. turned: q and k are turned by rotary positions, and
    dq and dk are turned back, by cos and sin (T, D/2) float32.

    Raises UnsupportedSize if D is not a multiple of 16 from 32 to 128, KV does not divide H, or a
    limit of the device is broken: float32 with D = 128 needs 33 KB of OpenCL's local memory.
    """
    if D % 16 or not 32 <= D <= 128:
        raise UnsupportedSize(f"head_dim: got {D}, allowed are multiples of 16 from 32 to 128")
    if H % KV:
        raise UnsupportedSize(f"num_kv_heads: got {KV}, must divide num_heads, {H}")
    limits = limits or LIMITS[dialect]
    fragment = fragments(dialect, dtype)
    code, own, arguments = PASSES[which]
    cut = cut or default_cut(dialect, which, D, dtype, limits)
    macros: dict[str, int | str] = {
        "B": B, "T": T, "H": H, "KV": KV, "D": D, "PASS": code, "SCALE": f"{1 / math.sqrt(D)!r}f",
        "OWN_ROWS": cut.own_rows, "TILE": cut.tile, "BUFFERS": cut.buffers,
        "UNROLL_K": 2 if fragment == TF32X3 else 8,
    }  # fmt: skip
    if turned:
        macros["TURNED"] = 1
    if dialect != "opencl":  # where pocl miscompiles branches inside the loop
        macros["MASK_ONLY_EDGES"] = 1
    multiplied = {"forward": 2, "gradient_q": 3, "gradient_kv": 4}[which]
    return blocks.launch(
        "attention",
        dialect,
        macros,
        name=f"attention_{which}_{B}_{T}_{H}_{KV}_{D}",
        dtype=dtype,
        fragment=fragment,
        min_blocks=cut.blocks,
        grid=(-(-T // cut.own_rows), 1, B * (KV if which == "gradient_kv" else H)),
        threads=cut.threads,
        shared_bytes=_attention_bytes(cut, own, D, dtype, fragment),
        arguments=(*arguments, *("cos", "sin") * turned),
        flops=multiplied * B * H * T * T * D,  # 2 per multiplication, half of them seen
        limits=limits,
        products=(B * T, T * D, H * D, T * H),
    )


# Cuts in the order in which they are tried: (own_rows, tile, buffers).
CUTS = ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 1), (32, 16, 1), (16, 16, 1))


def delta(dialect: Dialect, B: int, T: int, H: int, D: int, dtype: DType) -> Launch:
    """delta (B, H, T) float32 from dout and out (B, T, H, D), see delta.c."""
    vec = rows.vector(itemsize(dtype), D)
    per_block = rows.THREADS // (D // vec)
    return rows.launch(
        "delta", dialect, {"B": B, "T": T, "H": H, "D": D}, vec=vec,
        grid=(-(-B * T * H // per_block), 1), dtype=dtype, threads=rows.THREADS,
        arguments=("delta", "dout", "out"), flops=2 * B * T * H * D, shared=rows.THREADS,
        products=(B * T * H,),
    )  # fmt: skip


def default_cut(dialect: Dialect, which: Pass, D: int, dtype: DType, limits: Limits) -> Cut:
    """The first of CUTS whose tiles fit. Raises UnsupportedSize where none does.

    What every device of a dialect has is enough, if there is such a cut: more memory per block
    leaves room for fewer blocks. Two places help only where copies are asynchronous. In float32,
    tiles of 64 rows, and two places of them, take more registers than there are.
    """
    fragment, own = fragments(dialect, dtype), PASSES[which][1]
    cuts = []
    for own_rows, tile, buffers in CUTS:
        if buffers > 1 and fragment != MMA16:
            continue
        blocks = 3 if which == "forward" and tile == 64 else 2
        if D > 64 and which == "gradient_kv":
            blocks = 1
        cuts.append(Cut(own_rows, tile, buffers, blocks))
    needed = [_attention_bytes(cut, own, D, dtype, fragment) for cut in cuts]
    for allowed in (LIMITS[dialect].shared_bytes, limits.shared_bytes):
        for cut, size in zip(cuts, needed, strict=True):
            if size <= min(allowed, limits.shared_bytes):
                return cut
    raise UnsupportedSize(
        f"attention with head_dim {D} in {dtype} needs {needed[-1]} bytes of shared memory per "
        f"block; {dialect} allows {limits.shared_bytes}"
    )


def _attention_bytes(cut: Cut, own: int, D: int, dtype: DType, fragment: int) -> int:
    tiles = (own * cut.own_rows + 2 * cut.buffers * cut.tile) * D * itemsize(dtype)
    return tiles + (4 * cut.own_rows * cut.tile if fragment == FMA else 0)  # scores
