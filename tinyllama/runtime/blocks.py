"""GPU launches: the text of a kernel of `ops/gpu/` for a device's language, and how to start it.

A text is put together from macros, `common.h`, the header of a dialect (CUDA, Metal or OpenCL),
`tile.h` and the kernel. This module chooses how the work is cut up, checks what a device allows,
and returns text, blocks, threads and shared memory. It imports nothing of tinygrad.

The interface for tinygrad's graph (not written yet; see `kernel.run` for the CPU's):

    launch = blocks.product("cuda", "NT", M, N, K, dtype="bfloat16")
    blocks.run(launch, outputs, inputs)          -> the outputs, as results of this kernel

`run` makes each input contiguous and calls `Tensor.custom_kernel(*outputs, *inputs)` with a
function that returns

    UOp(Ops.PROGRAM, src=(sink, device, linear, UOp(Ops.SOURCE, arg=launch.text)),
        arg=ProgramInfo(launch.name, global_size=launch.grid, local_size=(launch.threads, 1, 1),
                        globals=..., outs=..., ins=..., aux=...))

with aux = () on Metal, (launch.dynamic_bytes,) on CUDA, and on OpenCL one tuple that lists each
argument's pointer type. On CUDA a fifth source, BINARY, holds the cubin that NVRTC made for the
card, since PTX of a newer NVRTC than the driver's does not load. The op files then pick in one
table, `portable | cpu | gpu`, where `gpu` applies if `product` or `attention` below does not raise
UnsupportedSize for the sizes at hand. `launch.arguments` are the buffers in their order:

    product     c, a, b [, scales [, minima]] [, addend]; with split > 1, c is (split, M, N) float32
                and `c.sum(0)` adds the parts in a fixed order
    attention   forward      out, lse, q, k, v, starts
                gradient_q   dq, q, k, v, dout, lse, delta, starts
                gradient_kv  dk, dv, q, k, v, dout, lse, delta, starts
                with delta = (dout * out).sum(-1) as (B, H, T) float32
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal

Dialect = Literal["cuda", "metal", "opencl"]
DType = Literal["float32", "bfloat16", "float16"]
Layout = Literal["NT", "NN", "TN"]
Pass = Literal["forward", "gradient_q", "gradient_kv"]

# As in runtime/kernel.py and ops/cpu/common.h.
TYPE_CODE: Mapping[DType, int] = {"float32": 0, "bfloat16": 1, "float16": 2}
FMA, TF32X3, MMA16, SIMDGROUP = 0, 1, 2, 3  # FRAGMENT of common.h
KSTEP: Mapping[int, int] = {FMA: 1, TF32X3: 8, MMA16: 16, SIMDGROUP: 8}


class UnsupportedSize(ValueError):
    """Sizes that a kernel does not take; the portable form of the operation does."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a launch may use."""

    shared_bytes: int  # that a kernel declares, per block
    threads: int = 1024  # per block
    buffers: int | None = None  # arguments


# CUDA: more than 48 KB must be requested at the launch, which tinygrad 0.13 forgets in a captured
# step. OpenCL: the least that full devices have; many have 48 or 64 KB.
LIMITS: Mapping[Dialect, Limits] = {
    "cuda": Limits(48 << 10),
    "metal": Limits(32 << 10, buffers=31),
    "opencl": Limits(32 << 10),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's text, and how it is started."""

    name: str  # of the function in the text
    text: str
    grid: tuple[int, int, int]  # blocks
    threads: int  # per block
    shared_bytes: int  # per block, declared in the text or given at the launch
    arguments: tuple[str, ...]  # buffers in their order
    flops: int  # of the operation, without what edges and masks add
    dynamic_bytes: int = 0  # of shared memory that the launch gives


@dataclasses.dataclass(frozen=True)
class Packed:
    """B of a product as integers: q scale, or q scale + minimum, float16, per group of a row."""

    bits: Literal[4, 8] = 4
    group: Literal[32, 64] = 64
    minimum: bool = False  # then q is unsigned


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut up; see ops/gpu/gemm.c."""

    bm: int = 128  # rows and columns of C per block
    bn: int = 128
    bk: int = 32
    wm: int = 64  # and per group of 32 lanes
    wn: int = 64
    stages: int = 3
    blocks: int = 2  # per multiprocessor, at least: limits registers on CUDA
    pipelined: bool = False
    unroll: int = 0  # steps of k that are unrolled; 0: all of a tile
    band: int = 8  # rows of blocks that run together

    @property
    def threads(self) -> int:
        return 32 * (self.bm // self.wm) * (self.bn // self.wn)

    def shared_bytes(self, itemsize: int) -> int:
        return self.stages * (self.bm + self.bn) * self.bk * itemsize


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


def product(
    dialect: Dialect,
    layout: Layout,
    M: int,
    N: int,
    K: int,
    dtype: DType,
    out: DType | None = None,
    *,
    addend: bool = False,
    accumulate: bool = False,
    packed: Packed | None = None,
    split: int = 1,
    tile: Tile | None = None,
    fragment: int | None = None,
    limits: Limits | None = None,
) -> Launch:
    """The launch of C (M, N) = A B^T ("NT"), A B ("NN") or A^T B ("TN"), see ops/gpu/gemm.c.

    dtype: of A and B (packed: of A, and what B is widened to). out: of C and addend, dtype if not
    given; float32 with split > 1, where C is (split, M, N) and its sum is the result. addend: a
    matrix of C's shape is added. accumulate: the product is added to what C holds.

    Raises UnsupportedSize if rows are no multiples of 16 bytes, or a limit of the device is broken.
    """
    itemsize = _itemsize(dtype)
    out = "float32" if split > 1 else out or dtype
    fragment = fragments(dialect, dtype) if fragment is None else fragment
    tile = tile or default_tile(dialect, M, N, dtype, fragment)
    limits = limits or LIMITS[dialect]
    _check_product(layout, (M, N, K), itemsize, tile, split, addend or accumulate, fragment)
    if packed:
        _check_packed(packed, layout, N if layout == "NN" else K, tile)
    shared = tile.shared_bytes(itemsize)
    arguments = ["c", "a", "b"]
    macros: dict[str, int | str] = {
        "M": M, "N": N, "K": K, "OUT_TYPE": TYPE_CODE[out], "LAYOUT": layout, "SPLIT": split,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "WM": tile.wm, "WN": tile.wn,
        "STAGES": tile.stages, "BAND": tile.band,
        "UNROLL_K": tile.unroll or (tile.bk // KSTEP[fragment] if fragment else 4),
    }  # fmt: skip
    if packed:
        arguments += ["scales", "minima"] if packed.minimum else ["scales"]
        macros |= {"BITS": packed.bits, "GROUP": packed.group}
    if addend:
        arguments.append("addend")
    flags = {
        "MINIMUM": packed is not None and packed.minimum,
        "ADDEND": addend,
        "ACCUMULATE": accumulate,
        "PIPELINED": tile.pipelined,
    }
    macros |= {name: 1 for name, value in flags.items() if value}
    return _launch(
        "gemm",
        dialect,
        macros,
        name=f"gemm_{layout.lower()}_{M}_{N}_{K}",
        dtype=dtype,
        fragment=fragment,
        blocks=tile.blocks,
        grid=(-(-M // tile.bm) * -(-N // tile.bn), 1, split),
        threads=tile.threads,
        shared_bytes=shared,
        arguments=arguments,
        flops=2 * M * N * K,
        limits=limits,
    )


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
    cut: Cut | None = None,
    limits: Limits | None = None,
) -> Launch:
    """The launch of one pass of attention, see ops/gpu/attention.c for its formula and arguments.

    q, dout, out, dq (B, T, H, D) and k, v, dk, dv (B, T, KV, D) have type `dtype`; lse and delta
    (B, H, T) are float32, starts (B, T) int32.

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
    if dialect != "opencl":  # where pocl miscompiles branches inside the loop
        macros["MASK_ONLY_EDGES"] = 1
    products = {"forward": 2, "gradient_q": 3, "gradient_kv": 4}[which]
    return _launch(
        "attention",
        dialect,
        macros,
        name=f"attention_{which}_{B}_{T}_{H}_{KV}_{D}",
        dtype=dtype,
        fragment=fragment,
        blocks=cut.blocks,
        grid=(-(-T // cut.own_rows), 1, B * (KV if which == "gradient_kv" else H)),
        threads=cut.threads,
        shared_bytes=_attention_bytes(cut, own, D, dtype, fragment),
        arguments=arguments,
        flops=products * B * H * T * T * D,  # 2 per multiplication, half of them seen
        limits=limits,
    )


def fragments(dialect: Dialect, dtype: DType) -> int:
    """FRAGMENT of common.h: which instructions multiply."""
    if dialect == "cuda":
        return TF32X3 if dtype == "float32" else MMA16
    return SIMDGROUP if dialect == "metal" else FMA


def default_tile(dialect: Dialect, M: int, N: int, dtype: DType, fragment: int) -> Tile:
    """The tile of a product that fits the dialect's limits.

    Products of which one side is at most 32, as LoRA's are, get blocks that are as thin.
    """
    if dialect != "cuda":
        tile = Tile(bm=64, bn=64, wm=32, wn=32, stages=2)
        thin = (16, 32)
    elif fragment == FMA:
        tile, thin = Tile(bk=16, wn=32), (16, 32)
    else:
        tile = Tile(bk=16, unroll=1) if dtype == "float32" else Tile()
        thin = (32, 32)
    if N <= 32:
        return dataclasses.replace(tile, bn=32, wm=thin[1], wn=thin[0])
    if M <= 32:
        return dataclasses.replace(tile, bm=32, wm=thin[0], wn=thin[1])
    return tile


# Cuts in the order in which they are tried: (own_rows, tile, buffers).
CUTS = ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 1), (32, 16, 1), (16, 16, 1))


def default_cut(dialect: Dialect, which: Pass, D: int, dtype: DType, limits: Limits) -> Cut:
    """The first of CUTS whose tiles fit. Raises UnsupportedSize where none does.

    Two places help only where copies are asynchronous. In float32, tiles of 64 rows, and two places
    of them, take more registers than there are.
    """
    fragment = fragments(dialect, dtype)
    own = PASSES[which][1]
    least = 0
    for own_rows, tile, buffers in CUTS:
        if buffers > 1 and fragment != MMA16:
            continue
        blocks = 3 if which == "forward" and tile == 64 else 2
        if D > 64 and which == "gradient_kv":
            blocks = 1
        cut = Cut(own_rows, tile, buffers, blocks)
        least = _attention_bytes(cut, own, D, dtype, fragment)
        if least <= limits.shared_bytes:
            return cut
    raise UnsupportedSize(
        f"attention with head_dim {D} in {dtype} needs {least} bytes of shared memory per block; "
        f"{dialect} allows {limits.shared_bytes}"
    )


def best_split(M: int, N: int, K: int, tile: Tile, multiprocessors: int, flops: float) -> int:
    """Into how many parts of K to split, so that no multiprocessor idles: 1 to 12.

    flops: per second that a full device computes. Each part costs a pass over float32 partial sums,
    written and read at 3 TB/s (an estimate).
    """
    tiles = -(-M // tile.bm) * -(-N // tile.bn)

    def seconds(split: int) -> float:
        rounds = -(-tiles * split // multiprocessors)
        computing = 2 * M * N * K / flops * rounds * multiprocessors / (tiles * split)
        return computing + (8 * M * N * split / 3e12 if split > 1 else 0)

    return min(range(1, min(12, -(-K // tile.bk)) + 1), key=seconds)


def _attention_bytes(cut: Cut, own: int, D: int, dtype: DType, fragment: int) -> int:
    tiles = (own * cut.own_rows + 2 * cut.buffers * cut.tile) * D * _itemsize(dtype)
    return tiles + (4 * cut.own_rows * cut.tile if fragment == FMA else 0)  # scores


def _itemsize(dtype: DType) -> int:
    return 4 if dtype == "float32" else 2


def _check_product(
    layout: Layout,
    sizes: tuple[int, int, int],
    itemsize: int,
    tile: Tile,
    split: int,
    added: bool,
    fragment: int,
) -> None:
    M, N, K = sizes
    chunk = 16 // itemsize
    rows = {"NT": {"K": K}, "NN": {"K": K, "N": N}, "TN": {"M": M, "N": N}}[layout]
    wrong = [f"{name} {size}" for name, size in rows.items() if size % chunk]
    if wrong or N % 2:
        found = ", ".join(wrong) or f"N {N}"
        raise UnsupportedSize(
            f"a product {layout} of {M} x {N} x {K}: rows of A and B must be multiples of "
            f"{chunk} elements and N even; {found} is not"
        )
    assert split >= 1 and not (split > 1 and added), "parts of a sum take no addend"
    assert tile.stages >= 2 and tile.bk % KSTEP[fragment] == 0
    assert tile.bm % tile.wm == 0 and tile.bn % tile.wn == 0
    assert tile.wm % 16 == 0 and tile.wn % 16 == 0


def _check_packed(packed: Packed, layout: Layout, row: int, tile: Tile) -> None:
    """row: elements of a row of B, along which groups lie."""
    if row % packed.group:
        raise UnsupportedSize(
            f"groups of {packed.group} do not divide rows of {row} packed numbers"
        )
    assert layout != "TN", "packed weights have no gradient"
    assert not tile.pipelined, "packed numbers are widened by the plain loop"
    held = tile.bn * tile.bk // tile.threads  # numbers that a thread widens per tile
    assert held in (8, 16, 32) and held * tile.threads == tile.bn * tile.bk
    assert (tile.bk if layout == "NT" else tile.bn) % held == 0


def _launch(
    kernel: Literal["gemm", "attention"],
    dialect: Dialect,
    macros: Mapping[str, int | str],
    *,
    name: str,
    dtype: DType,
    fragment: int,
    blocks: int,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[str],
    flops: int,
    limits: Limits,
) -> Launch:
    """Put the text together, and hold it to the limits."""
    if shared_bytes > limits.shared_bytes:
        raise UnsupportedSize(
            f"{kernel}: {shared_bytes} bytes of shared memory per block; {dialect} allows "
            f"{limits.shared_bytes}"
        )
    if threads > limits.threads:
        raise UnsupportedSize(
            f"{kernel}: {threads} threads per block; {dialect} allows {limits.threads}"
        )
    if limits.buffers is not None and len(arguments) > limits.buffers:
        raise UnsupportedSize(
            f"{kernel}: {len(arguments)} buffers; {dialect} allows {limits.buffers}"
        )
    dynamic = dialect == "cuda" and shared_bytes > LIMITS["cuda"].shared_bytes
    more: dict[str, int | str] = {
        "NAME": name, "TYPE": TYPE_CODE[dtype], "FRAGMENT": fragment, "THREADS": threads,
        "MIN_BLOCKS": blocks,
    }  # fmt: skip
    if dynamic:
        more["DYNAMIC"] = 1
    text = complete(kernel, dialect, {**more, **macros})
    return Launch(
        name, text, grid, threads, shared_bytes, tuple(arguments), flops, shared_bytes * dynamic
    )


def complete(kernel: str, dialect: Dialect, macros: Mapping[str, int | str]) -> str:
    """The whole text of a kernel: its macros, then the files in their order."""
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    if dialect == "metal":  # whose library has names such as D and T
        lines.insert(0, "#include <metal_stdlib>")
    files = ("common.h", f"{dialect}.h", "tile.h", f"{kernel}.c")
    return "\n".join(lines) + "\n" + "".join(source(file) for file in files)


@functools.cache
def source(file: str) -> str:
    """Text of a file of `ops/gpu/`."""
    return (resources.files("tinyllama.ops") / "gpu" / file).read_text(encoding="utf-8")
