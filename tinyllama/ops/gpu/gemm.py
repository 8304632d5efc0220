"""How a matrix product is launched on a GPU: see gemm.c."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import (
    FMA,
    KSTEP,
    MMA16,
    SIMDGROUP,
    TF32X3,
    TYPE_CODE,
    Dialect,
    DType,
    Launch,
    Limits,
    UnsupportedSize,
    fragments,
    itemsize,
)

Layout = Literal["NT", "NN", "TN"]
LAYOUTS: tuple[Layout, ...] = ("NT", "NN", "TN")
# Per second, of a full device: estimates, which only weigh partial sums against idle blocks.
FLOPS: Mapping[int, float] = {FMA: 5e12, TF32X3: 6e13, MMA16: 3.5e14, SIMDGROUP: 5e12}
LAUNCH_SECONDS = 2e-6
SMALLER_TILE = 0.88  # of them, in blocks of 96 x 96: an estimate too
MOST_TOGETHER = 3  # products of a launch, see BATCH and TERMS of gemm.c
NEARLY = 1.1  # times the least: of what takes no longer, the fewest parts are taken


@dataclasses.dataclass(frozen=True)
class Packed:
    """B of a product as integers: q scale, or q scale + minimum, float16, per group of a row."""

    bits: Literal[4, 8] = 4
    group: int = 64  # 32 or 64
    minimum: bool = False  # then q is unsigned


@dataclasses.dataclass(frozen=True)
class Turned:
    """Results that are turned by rotary positions: heads of columns, rows of positions."""

    head: int
    length: int  # positions: row r is position r % length
    results: int = 1  # so many of a batch, the first ones


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

    def shared_bytes(self, size: int) -> int:
        return self.stages * (self.bm + self.bn) * self.bk * size


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
    terms: int = 1,
    batch: int = 1,
    gated: bool = False,
    ungated: bool = False,
    turned: Turned | None = None,
    tile: Tile | None = None,
    fragment: int | None = None,
    limits: Limits | None = None,
) -> Launch:
    """The launch of C (M, N) = A B^T ("NT"), A B ("NN") or A^T B ("TN"), see ops/gpu/gemm.c.

    dtype: of A and B (packed: of A, and what B is widened to). out: of C and addend, dtype if not
    given; float32 with split > 1, where C is (split, M, N) and its sum is the result. addend: a
    matrix of C's shape is added. accumulate: the product is added to what C holds.

    More than one product, see gemm.c for what they compute; the arguments are then
        terms    c, a, b, a1, b1, ...     batch    c, c1, ..., a, b, x1, ...
        gated    c, gate, up, a, b, b1    ungated  dgate, dup, a, b, gate, up
        turned   c, [c1, ...,] a, b, [x1, ...,] cos, sin

    Raises UnsupportedSize if rows are no multiples of 16 bytes, or a limit of the device is broken.
    """
    size = itemsize(dtype)
    out = "float32" if split > 1 else out or dtype
    fragment = fragments(dialect, dtype) if fragment is None else fragment
    tile = tile or default_tile(dialect, M, N, dtype, fragment)
    _check_product(layout, (M, N, K), size, tile, split, addend or accumulate, fragment)
    if turned and (turned.head % 16 or tile.wn % turned.head):
        raise UnsupportedSize(f"heads of {turned.head} in groups of {tile.wn} columns")
    if gated and tile.wn % 32:  # a factor is read 16 columns at a time
        raise UnsupportedSize(f"two matrices in groups of {tile.wn} columns")
    if packed:
        _check_packed(packed, layout, N if layout == "NN" else K, tile)
    shared = tile.shared_bytes(size)
    more = range(1, batch)
    results = ["c", *(f"c{n}" for n in more)]
    arguments = ["a", "b", *(f"x{n}" for n in more)]
    arguments += [f"{letter}{n}" for n in range(1, terms) for letter in "ab"]
    if gated:
        results, arguments = ["c", "gate", "up"], ["a", "b", "b1"]
    if ungated:
        results, arguments = ["dgate", "dup"], ["a", "b", "gate", "up"]
    macros: dict[str, int | str] = {
        "M": M, "N": N, "K": K, "OUT_TYPE": TYPE_CODE[out], "LAYOUT": layout, "SPLIT": split,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "WM": tile.wm, "WN": tile.wn,
        "STAGES": tile.stages, "BAND": tile.band, "TERMS": terms, "BATCH": batch,
        "UNROLL_K": tile.unroll or (tile.bk // KSTEP[fragment] if fragment else 4),
    }  # fmt: skip
    if packed:
        arguments += ["scales", "minima"] if packed.minimum else ["scales"]
        macros |= {"BITS": packed.bits, "GROUP": packed.group}
    if addend:
        arguments.append("addend")
    if turned:
        arguments += ["cos", "sin"]
        macros |= {"TURNED": turned.results, "HEAD": turned.head, "T": turned.length}
    flags = {
        "MINIMUM": packed is not None and packed.minimum,
        "ADDEND": addend,
        "ACCUMULATE": accumulate,
        "PIPELINED": tile.pipelined,
        "GATED": gated,
        "UNGATED": ungated,
    }
    macros |= {name: 1 for name, value in flags.items() if value}
    return blocks.launch(
        "gemm",
        dialect,
        macros,
        name=_name(layout, M, N, K, terms, batch, gated, ungated),
        dtype=dtype,
        fragment=fragment,
        min_blocks=tile.blocks,
        grid=(-(-M // tile.bm) * -(-N // (tile.bn >> gated)), 1, split * batch),
        threads=tile.threads,
        shared_bytes=shared,
        arguments=[*results, *arguments],
        flops=2 * M * N * K * terms * batch * (1 + gated),
        updates=accumulate,
        limits=limits,
        products=(turned.length * turned.head,) if turned else (),
    )


def _name(
    layout: Layout, M: int, N: int, K: int, terms: int, batch: int, gated: bool, ungated: bool
) -> str:
    more = {"sum": terms, "batch": batch, "gated": 2 * gated, "ungated": 2 * ungated}
    words = [f"{word}{count}" for word, count in more.items() if count > 1]
    return "_".join(["gemm", layout.lower(), str(M), str(N), str(K), *words])


def default_tile(
    dialect: Dialect, M: int, N: int, dtype: DType, fragment: int | None = None
) -> Tile:
    """The tile of a product that fits the dialect's limits.

    Products of which one side is at most 32, as LoRA's are, get blocks that are as thin. Groups of
    lanes stay 32 columns wide, which gate and up in one and heads that are turned need.
    """
    fragment = fragments(dialect, dtype) if fragment is None else fragment
    if dialect != "cuda":
        tile, thin = Tile(bm=64, bn=64, wm=32, wn=32, stages=2), 16
    elif fragment == FMA:
        tile, thin = Tile(bk=16, wn=32), 16
    else:
        tile, thin = Tile(bk=16, unroll=1) if dtype == "float32" else Tile(), 32
    if N <= 32:
        return dataclasses.replace(tile, bn=32, wm=thin, wn=32)
    if M <= 32:
        return dataclasses.replace(tile, bm=32, wm=thin, wn=32)
    return tile


def best_cut(
    dialect: Dialect, M: int, N: int, K: int, dtype: DType, multiprocessors: int, batch: int = 1
) -> tuple[Tile, int]:
    """The tile and the split (1 to 12) with which a product, or a batch of such, takes the least
    time, by an estimate.

    Blocks of 96 x 96 take more reads per multiplication than those of 128 x 128, but may divide a
    matrix among the multiprocessors without a rest, where larger ones need partial sums for it.
    """
    tile = default_tile(dialect, M, N, dtype)
    flops, tiles = FLOPS[fragments(dialect, dtype)], {tile: 1.0}
    if (dialect, tile.bm, tile.bn) == ("cuda", 128, 128):
        tiles[dataclasses.replace(tile, bm=96, bn=96, wm=48, wn=48)] = SMALLER_TILE
    found = [
        (seconds(M * batch, N, K, cut, split, multiprocessors, share * flops), split, cut)
        for cut, share in tiles.items()
        for split in range(1, min(12, -(-K // cut.bk)) + 1)
    ]
    least = min(time for time, _, _ in found)
    nearly = [way for way in found if way[0] <= NEARLY * least]
    _, split, best = min(nearly, key=lambda way: (way[1], way[0]))
    return best, split


def best_split(M: int, N: int, K: int, tile: Tile, multiprocessors: int, flops: float) -> int:
    """Into how many parts of K to split, so that few multiprocessors idle: 1 to 12.

    flops: per second that a full device computes. Of what takes nearly the least time, the fewest
    parts.
    """
    splits = range(1, min(12, -(-K // tile.bk)) + 1)
    times = [seconds(M, N, K, tile, split, multiprocessors, flops) for split in splits]
    return 1 + next(i for i, time in enumerate(times) if time <= NEARLY * min(times))


def seconds(
    M: int, N: int, K: int, tile: Tile, split: int, multiprocessors: int, flops: float
) -> float:
    """An estimate: a multiprocessor computes its blocks one after another.

    A split costs a pass over float32 partial sums for each part, written and read at 3 TB/s, and
    the launch of a kernel that adds them up.
    """
    tiles = -(-M // tile.bm) * -(-N // tile.bn)
    rounds = -(-tiles * split // multiprocessors)
    block = 2 * tile.bm * tile.bn * (K / split) / (flops / multiprocessors)
    return rounds * block + (LAUNCH_SECONDS + 8 * M * N * split / 3e12 if split > 1 else 0)


def _check_product(
    layout: Layout,
    sizes: tuple[int, int, int],
    size: int,
    tile: Tile,
    split: int,
    added: bool,
    fragment: int,
) -> None:
    M, N, K = sizes
    chunk = 16 // size
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
    if packed.group not in (32, 64):
        raise UnsupportedSize(f"groups of {packed.group} packed numbers, allowed are 32 and 64")
    if row % packed.group:
        raise UnsupportedSize(
            f"groups of {packed.group} do not divide rows of {row} packed numbers"
        )
    assert layout != "TN", "packed weights have no gradient"
    assert not tile.pipelined, "packed numbers are widened by the plain loop"
    held = tile.bn * tile.bk // tile.threads  # numbers that a thread widens per tile
    if held < 8:  # float32 with at most 32 columns, on CUDA
        raise UnsupportedSize(f"tiles of {tile.bn} x {tile.bk} packed numbers are too small")
    assert held in (8, 16, 32) and held * tile.threads == tile.bn * tile.bk
    assert (tile.bk if layout == "NT" else tile.bn) % held == 0
