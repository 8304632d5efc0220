"""No integer of a kernel leaves its type, for all sizes that Python lets through.

Python's limits are LARGEST of runtime/kernel.py: rows and columns of every tensor that a kernel
computes with are fewer (ops/forms.py), and so are the sizes and the products of sizes that a GPU's
text computes in 32 bits (runtime/blocks.py). c_ranges.py runs each kernel's text, as clang parses
it, on ranges instead of numbers. What ranges do not know, z3 proves here.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import z3
from c_ranges import Ranges
from proof_source import OPS, CText, least, proved, quoted, with_fault
from test_products import TILES, blocks, c_text, divided_text, forms

from tinyllama.ops.gpu import adamw as gpu_adamw
from tinyllama.ops.gpu import attention as gpu_attention
from tinyllama.ops.gpu import cached_attention as gpu_cached
from tinyllama.ops.gpu import cross_entropy as gpu_cross_entropy
from tinyllama.ops.gpu import embedding as gpu_embedding
from tinyllama.ops.gpu import few_rows as gpu_few_rows
from tinyllama.ops.gpu import gemm as gpu_gemm
from tinyllama.ops.gpu import narrow as gpu_narrow
from tinyllama.ops.gpu import rms_norm as gpu_rms_norm
from tinyllama.ops.gpu import rope as gpu_rope
from tinyllama.ops.gpu import swiglu as gpu_swiglu
from tinyllama.ops.gpu.gemm import Packed, Turned
from tinyllama.runtime import blocks as blocks_of_gpu
from tinyllama.runtime.blocks import LIMITS, DType, Launch, UnsupportedSize, source
from tinyllama.runtime.kernel import LARGEST

MOST = LARGEST - 1
INT = 2**31 - 1
THREADS = 1 << 10
X86 = ("--target=x86_64-linux-gnu", "-mfma", "-mf16c")
FLAGS = {
    "TILE_AVX512": (*X86, "-mavx512f", "-mavx512bf16", "-mavx512bw", "-mavx512vl"),
    "TILE_AMX": (*X86, "-mavx512f", "-mavx512bf16", "-mavx512bw", "-mavx512vl"),
    "TILE_AVX2": (*X86, "-mavx2"),
    "TILE_NEON": ("--target=aarch64-linux-gnu",),
    "TILE_GENERIC": ("--target=x86_64-linux-gnu",),
}
SIZE = (1, MOST)
TO_MOST = (0, MOST)
COMMON = {"NT": (1, THREADS)}


def completed(
    files: tuple[str, ...], defines: Mapping[str, object], constants: Mapping[str, str]
) -> str:
    """The text of a kernel, in which `constants` (their names and types) have any value."""
    lines = [f"#define {name} {value}" for name, value in {"KERNEL": "kernel", **defines}.items()]
    lines += [f"extern const {kind} {name};" for name, kind in constants.items()]
    return "\n".join([*lines, *map(CText.source, ("common.h", *files))])


def unnamed(text: str, macros: Mapping[str, str]) -> str:
    """The text with constants of any value in place of macros, which must have these types."""
    for name, kind in macros.items():
        text, count = re.subn(
            rf"^#define {name} .*$", f"extern const {kind} {name};", text, flags=re.M
        )
        assert count == 1, f"{name}: {count} definitions"
    return text


# ---- the matrix product of the CPU

BLOCK_MACROS = ("DEPTH", "BLOCK_PANELS", "BLOCK_COLS", "BLOCK_ROWS", "B_SLOTS", "A_SLOTS")


def gemm_files(tile: str, *packing: str, divided: bool = False) -> tuple[str, ...]:
    form = ("tile_vector.h",)
    if tile == "TILE_AMX":
        form = ("amx.h", *(["bf16x3.h"] if divided else []), "tile_amx.h")
    return ("tile.h", *packing, "pairs.h", "panels.h", *form, "gemm.c")


def gemm(
    tile: str,
    layout: int,
    types: tuple[int, int, int] = (0, 0, 0),
    *,
    pair: int = 1,
    rows: int | None = None,
    divided: bool = False,
    packed: Mapping[str, object] | None = None,
) -> Ranges:
    defines: dict[str, object] = {tile: 1, "VW": TILES[tile], "LAYOUT": layout}
    defines |= {"A_T": types[0], "B_T": types[1], "C_T": types[2], "COMPUTE_BF16": pair - 1}
    defines |= {"MANY_ROWS": 1} if rows is None else {"M": rows}
    defines |= {"BF16X3": 1} if divided else {}
    added = ("ACCUMULATE", "ADDEND")
    defines |= {name: name for name in added}  # constants of any value
    names = ["N", "K", "NT", *added, *(["M"] if rows is None else [])]
    names += ["BLOCK"] if packed is not None else []
    files = gemm_files(tile, *(["int4.h"] if packed is not None else []), divided=divided)
    text = completed(files, {**defines, **(packed or {})}, dict.fromkeys(names, "int"))
    text = text.replace("#ifndef SCRATCH_FLOATS", "extern const long SCRATCH_FLOATS;\n#if 0")
    text = unnamed(text, dict.fromkeys(BLOCK_MACROS, "int"))
    source = divided_text() if divided else c_text(tile, pair)
    kc, step = source.term("KC"), source.term("TILE_K")
    mr, nr, bc = (source.term(name) for name in ("MR", "NR", "BC"))
    tall = source.term("ROUND(MC, MR)")
    sizes = {"M": SIZE, "N": SIZE, "K": SIZE, **COMMON, "SCRATCH_FLOATS": (0, 2**40)}
    sizes |= {"DEPTH": (step, kc), "BLOCK_PANELS": (1, 2048 // step)}
    sizes |= {"BLOCK_COLS": (nr, bc // step), "BLOCK_ROWS": (mr, tall)}
    sizes |= dict.fromkeys(added, (0, 1))
    sizes |= {"B_SLOTS": (1, bc), "A_SLOTS": (1, 512 * 384), "BLOCK": (2, MOST)}
    known = {
        "multiply_block: r.m1 - r.m0": TO_MOST,  # shares of threads do not decrease
        "multiply_block: height": (0, tall),
        "multiply_block: k - k0": (0, 2048 + kc),
        "multiply_block: n - n0": (0, bc // step),
        "multiply_block: k1 - k": (1, 2048 + kc),
    }
    for function in ("pack_b", "finish_b", "panels_ahead", "int4_pack", "divide_b"):
        known[f"{function}: n - n0"] = known[f"{function}: n1 - n0"] = (0, 4 * nr)
    # What lies ahead is at least a number of a panel, spread over at least one step.
    known["panels_ahead: count"] = (1, 2 * kc)
    known["panels_ahead: steps"] = (1, 4 * tall * kc)
    for function in ("pack_a", "divide_a"):
        known[f"{function}: m - m0"] = (0, tall)
    known["finish_b: k"] = known["pack_a: k"] = (0, kc)
    # A row of a packed weight is in whole groups.
    known["int4_run: ((i / BLOCK) + 1) * BLOCK"] = known["int4_dots: (g + 1) * BLOCK"] = SIZE
    known["int4_dots: g * BLOCK"] = (0, MOST)
    known["bring_near: next.line"] = (0, 1 << 15)  # it is less than `lines` between two steps
    memory = dict.fromkeys(("m0", "m1", "n0", "n1"), TO_MOST)
    memory |= {"lines": (0, 1 << 15), "line": (0, 1 << 16), "rows": (0, 1 << 15), "each": (0, INT)}
    return Ranges(text, sizes, known, memory, FLAGS[tile])


CORE = (0, THREADS - 1)
PRODUCTS = [
    *((tile, layout, (0, 0, 0), pair, None) for tile, pair in forms() for layout in range(3)),
    *(("TILE_AVX512", layout, (1, 0, 1), 2, None) for layout in range(3)),
    *(("TILE_AMX", layout, (1, 1, 1), 2, None) for layout in range(3)),
    *(("TILE_NEON", layout, (2, 0, 2), 1, None) for layout in range(3)),
    *((tile, 0, (1, 0, 1), 1, 8) for tile in TILES if tile != "TILE_AMX"),
]


@pytest.mark.parametrize("tile,layout,types,pair,rows", PRODUCTS)
def test_no_index_of_a_product_leaves_its_type(
    tile: str, layout: int, types: tuple[int, int, int], pair: int, rows: int | None
) -> None:
    ranges = gemm(tile, layout, types, pair=pair, rows=rows)
    assert ranges.problems("kernel", core_id=CORE) == []


@pytest.mark.parametrize("layout", range(3))
def test_no_index_of_a_product_of_divided_numbers_leaves_its_type(layout: int) -> None:
    assert gemm("TILE_AMX", layout, divided=True).problems("kernel", core_id=CORE) == []


@pytest.mark.parametrize("bits,minima", [(4, 0), (8, 1)])
@pytest.mark.parametrize("tile,pair,rows,layout", [
    ("TILE_AVX512", 1, None, 0), ("TILE_AVX512", 2, None, 1), ("TILE_AVX512", 1, 8, 0),
    ("TILE_AMX", 2, None, 0), ("TILE_AMX", 2, None, 1), ("TILE_NEON", 1, 8, 0),
    ("TILE_AVX2", 1, 8, 0),
])  # fmt: skip
def test_no_index_of_a_product_with_a_packed_weight_leaves_its_type(
    tile: str, pair: int, rows: int | None, layout: int, bits: int, minima: int
) -> None:
    packed = {"BITS": bits, "MINIMA": minima}
    ranges = gemm(tile, layout, (1, 0, 1), pair=pair, rows=rows, packed=packed)
    assert ranges.problems("kernel", core_id=CORE) == []


def fit(parts: Iterable[object], *given: z3.BoolRef) -> None:
    """Every sum and product on the way is an int."""
    terms = [part for part in parts if isinstance(part, z3.ArithRef)]
    proved(z3.And(*(z3.And(part >= -INT, part <= INT) for part in terms)), *given)


@pytest.mark.parametrize("tile,pair", [
    ("TILE_AVX512", 2), ("TILE_AVX2", 1), ("TILE_NEON", 1), ("TILE_GENERIC", 1), ("TILE_AMX", 2),
])  # fmt: skip
def test_the_sizes_of_blocks_are_computed_within_an_int(tile: str, pair: int) -> None:
    """The macros that stand for themselves above: what is computed for them, and their ranges."""
    text, in_columns = c_text(tile, pair), c_text(tile, pair, 1, 2)
    M, N, K = z3.Ints("M N K")
    sizes = [0 < M, M <= MOST, 0 < N, N <= MOST, 0 < K, K <= MOST]
    kc, nr, bc = text.term("KC"), text.term("NR"), text.term("BC")
    text.parts.clear()
    slots, panels = text.term("SLOTS", K=K), z3.Int("panels")
    text.term("CEIL(SLOTS, KC)", SLOTS=slots)
    text.term("SLOTS + panels - 1", SLOTS=slots, panels=panels)
    fit(text.parts, *sizes, 0 < panels, panels <= MOST)
    for depth, count, given in blocks(text, pair):
        assert depth <= kc and count <= 2048 // text.term("TILE_K")
        assert depth * count < 2048 + depth
        block = {"DEPTH": depth, "BLOCK_PANELS": count}
        text.parts.clear()
        in_columns.parts.clear()
        columns, rows = text.term("BLOCK_COLS", N=N, **block), text.term("BLOCK_ROWS", M=M)
        claims = [columns >= nr, columns <= bc // (depth * count)]
        claims.append(text.term("B_SLOTS", BLOCK_COLS=columns, **block) <= bc)
        claims += [rows >= text.term("MR"), rows <= text.term("ROUND(MC, MR)")]
        claims += [form.term("A_SLOTS", M=M, **block) <= 512 * 384 for form in (text, in_columns)]
        proved(z3.And(*claims), *given, *sizes)
        fit([*text.parts, *in_columns.parts], *given, *sizes)


def test_what_a_block_of_a_product_is_known_for() -> None:
    """The ranges of `height`, `k - k0` and `n - n0` in multiply_block and what it calls. That
    r.m0 <= r.m1 is proved of `split` in test_products.py."""
    source = CText.source("gemm.c")
    for line in (
        "return (rectangle){split(M, MR, row, rows), split(M, MR, row + 1, rows),",
        "int blocks = CEIL(r.m1 - r.m0, BLOCK_ROWS);",
        "int height = blocks ? ROUND(CEIL(r.m1 - r.m0, blocks), MR) : 0;",
        "int k1 = MIN(k0 + BLOCK_PANELS * DEPTH, SLOTS);",
        "for (int k = k0; k < k1; k += DEPTH)",
        "for (int n = n0; n < n1; n += NR)",
        "int end = MIN(n + GROUP * NR, n1), after = MIN(end + GROUP * NR, n1);",
        "MIN(n + BLOCK_COLS, r.n1));",
        "int m1 = MIN(m0 + height, r.m1);",
    ):
        quoted(source, line)
    rows, wide, n, counted, tiles, whole = z3.Ints("rows wide n counted tiles whole")
    # blocks = ceil(rows / wide), and ceil(rows / blocks) is at most wide. Rounded up to tiles of mr
    # rows it still is, as wide (BLOCK_ROWS) is in whole tiles.
    given = (rows > 0, wide > 0, n > 0, (n - 1) * wide < rows, rows <= n * wide)
    proved(counted <= wide, *given, n * (counted - 1) < rows)
    for mr in {c_text(tile, pair).term("MR") for tile, pair in forms()}:
        rounded = (tiles * mr < counted + mr, wide == whole * mr)
        proved(tiles * mr <= wide, counted <= wide, *rounded)
    k0, k, deep, slots = z3.Ints("k0 k deep slots")
    k1 = least(k0 + deep, slots)
    proved(z3.And(k - k0 >= 0, k - k0 < deep, k1 - k >= 1), k0 <= k, k < k1)
    # What is left of K behind slot k, of pairs or single numbers: `count` of panels_ahead.
    quoted(CText.source("tile_amx.h"), "int count = MIN(depth * PAIR, K - k * PAIR);")
    K, pair = z3.Ints("K pair")
    proved(K - k * pair >= 1, pair >= 1, (slots - 1) * pair < K, k >= 0, k < slots)


# ---- attention and the other kernels of the CPU

VECTORS = {  # numbers in a vector
    "TILE_GENERIC": 4, "TILE_NEON": 4, "TILE_AVX2": 8, "TILE_AVX512": 16,
}  # fmt: skip
ACTS = (0, 1, 2)  # codes of storage types
NUMBERS = ("B", "T", "H", "KV", "D", "NT")
STARTS = {"starts": (0, MOST)}


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("tile,act", [*itertools.product(VECTORS, ACTS), ("TILE_AMX", 1)])
def test_no_index_of_attention_leaves_its_type(which: str, tile: str, act: int) -> None:
    amx = tile == "TILE_AMX"
    defines: dict[str, object] = {"VW": VECTORS.get(tile, 16), "ACT": act, "SCALE": "0.125f"}
    files: tuple[str, ...] = ("attention.h",)
    if amx:
        defines["TILE_AMX"] = 1
        files = (*files, "pairs.h", "amx.h", "attention_amx.h")
    files = (*files, f"attention_{which}{'_amx' * amx}.c")
    text = completed(files, defines, dict.fromkeys(NUMBERS, "int"))
    sizes = {**dict.fromkeys(NUMBERS, SIZE), **COMMON}
    known = {"t.key + k": (0, MOST), "s.first": (0, MOST), "s.first + i": (0, MOST + 96)}
    ranges = Ranges(text, sizes, known, STARTS, FLAGS[tile])
    assert ranges.problems("kernel", core_id=CORE) == []


# File -> files before it, macros, constants of any value.
ANY = (-INT - 1, INT)
OTHERS: dict[str, tuple[tuple[str, ...], dict[str, object], str]] = {
    "adamw.c": (("pairs.h", "../random_bits.h"), {}, "COUNT DECAY"),
    "cache_write.c": (("cache.h",), {"SEQUENCES": "SEQUENCES"}, "KV D S T SEQUENCES"),
    "cached_attention.c": (
        ("cache.h",), {"SEQUENCES": "SEQUENCES", "SCALE": "0.125f"},
        "KV D S T H SEQUENCES WINDOW SCRATCH_FLOATS",
    ),
    "cross_entropy.c": (("softmax.h",), {}, "N V GRADIENT"),
    "embedding_backward.c": ((), {}, "N H V"),
    "embedding_forward.c": ((), {}, "N H V"),
    "embedding_packed.c": (("int4.h",), {"LAYOUT": 0, "ROWS_ONLY": 1}, "COUNT N K BLOCK"),
    "narrow.c": (("pairs.h",), {}, "COUNT"),
    "rms_norm_backward.c": ((), {}, "N H"),
    "rms_norm_forward.c": ((), {"EPS": "1e-5f"}, "N H"),
    "rope.c": ((), {}, "B T HEADS D INVERSE"),
    "soft_targets.c": (
        ("softmax.h",),
        {"EPS": 0.1, "ZW": 0.1, "TEMP": 2.0, "HARD": 0.5, "SOFT": 2.0}, "N V K GRADIENT",
    ),
    "square_sum.c": ((), {}, "COUNT"),
    "swiglu_backward.c": ((), {}, "N H"),
    "swiglu_forward.c": ((), {}, "N H"),
}  # fmt: skip
# What decides which lines of a file are compiled.
VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "adamw.c": ({"COPY": 0, "STATE_T": 0}, {"COPY": 1, "STATE_T": 1}),
    "cached_attention.c": ({"ROWS": 1}, {"ROWS": 4}),
    "embedding_forward.c": ({"W_T": 0}, {"W_T": 1}),
    "embedding_packed.c": ({"BITS": 4, "MINIMA": 0}, {"BITS": 8, "MINIMA": 1}),
    "soft_targets.c": ({}, {"K": 9}),  # the first: any K, in what is compiled for 0
    "square_sum.c": ({"ACCUMULATE": 0}, {"ACCUMULATE": 1}),
}
WIDE = {"COUNT": 2**52, "SCRATCH_FLOATS": 2**40}  # constants with 64 bits, and their largest
SWITCHES = {**dict.fromkeys(("DECAY", "GRADIENT", "INVERSE"), (0, 1)), "WINDOW": TO_MOST}


@pytest.mark.parametrize("tile", VECTORS)
@pytest.mark.parametrize("file", OTHERS)
def test_no_index_of_another_kernel_leaves_its_type(file: str, tile: str) -> None:
    acts = ACTS if re.search(r"\bACT\b", CText.source(file)) else (0,)
    for act, variant in itertools.product(acts, VARIANTS.get(file, ({},))):
        assert problems_of_kernel(file, tile, {"ACT": act, **variant}) == [], (act, variant)


def problems_of_kernel(file: str, tile: str, variant: Mapping[str, object]) -> list[str]:
    """Problems of a file of OTHERS where these macros are set."""
    headers, defines, names = OTHERS[file]
    free = [name for name in [*names.split(), "NT"] if name not in variant]
    constants = {name: "long" if name in WIDE else "int" for name in free}
    width = VECTORS[tile]
    text = completed((*headers, file), {"VW": width, **defines, **variant}, constants)
    sizes = {name: (1, WIDE.get(name, MOST)) for name in constants} | COMMON
    sizes |= {name: SWITCHES[name] for name in SWITCHES if name in constants}
    known = {"int4_run: ((i / BLOCK) + 1) * BLOCK": SIZE}
    known["kernel: end - i"] = (0, width - 1)  # what a loop over whole vectors leaves
    if file == "cached_attention.c":  # ends are clipped to the slots
        quoted(CText.source(file), "s.high[i] = s.high[i] < S ? s.high[i] : S;")
        known |= dict.fromkeys(
            ("r / GROUP", "kernel: s.high[i]", "kernel: s.low[i]", "kernel: s.end", "s.first"),
            TO_MOST,
        )
    memory = {"position": (0, MOST), "targets": ANY, "ids": ANY}
    return Ranges(text, sizes, known, memory, FLAGS[tile]).problems("kernel", core_id=CORE)


def test_every_kernel_of_the_cpu_is_among_them() -> None:
    attention = {f"attention_{p}{f}.c" for p in ("forward", "backward") for f in ("", "_amx")}
    known = {"gemm.c", *attention, *OTHERS}
    assert {path.name for path in OPS.glob("*.c")} == known


# ---- the kernels of a GPU, as CUDA (the text is the same in all dialects)

PRELUDE = """
#define EMULATED
#define INLINE static inline
#define SHARED
#define SHARED_BY_LAUNCH(name) Element name[1 << 17];
#define KERNEL void
#define UNROLL
#define UNROLL_BY(count)
#define COMMIT()
#define WAIT(n)
typedef unsigned int u32;
extern const struct { int x, y, z; } threadIdx, blockIdx;
void __syncthreads(void);
void copy16(void *, const void *, int);
void ldmatrix(u32 *, const void *);
void ldmatrix_transposed(u32 *, const void *);
void mma_1(float *, const u32 *, const u32 *);
void mma_2(float *, const u32 *, const u32 *);
void mma_tf32(float *, const u32 *, const u32 *);
u32 bits_of(float);
float float_of(u32);
u32 pack_1(float, float);
u32 pack_2(float, float);
float widen_f16(unsigned short);
void load16(u32 *, const void *);
void load8(u32 *, const void *);
void store16(void *, u32, u32, u32, u32);
void store8(void *, u32, u32);
float exchanged(float, int, float *, int);
float EXP2(float);
float LOG2(float);
float SQRT(float);
float MAXF(float, float);
"""
Known = dict[str, tuple[int, int]]
MANY_PARTS = (1, MOST // 128 + 1)  # of a cache


def on_gpu(
    launch: Launch,
    names: str,
    known: Known,
    memory: Known | None = None,
    *,
    x: int = MOST - 1,
    z: int = MOST - 1,
) -> list[str]:
    """Problems of a launch's text in which macros, as `names` says, have any size; the numbers of
    blocks are at most x and z."""
    kinds = {name: "long" if name in WIDE else "int" for name in names.split()}
    sizes = {name: (1, WIDE.get(name, MOST)) for name in kinds}
    index: Known = {"blockIdx.x": (0, x), "blockIdx.z": (0, z)}
    index |= {"threadIdx.x": (0, launch.threads - 1)}
    text = PRELUDE + unnamed(launch.text, kinds)
    ranges = Ranges(text, sizes, {**index, **known}, memory)
    return ranges.problems(launch.name)


DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
GPU_PRODUCTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "added": {"addend": True, "accumulate": True},
    "in parts": {"split": 12, "batch": 3},
    "a sum": {"layout": "NN", "terms": 3},
    "columns": {"layout": "TN", "batch": 2},
    "gated": {"gated": True},
    "ungated": {"layout": "NN", "ungated": True},
    "turned": {"turned": Turned(64, 512, 2), "batch": 3},
    "packed": {"packed": Packed(4, 64, True)},
    "packed, the other way": {"packed": Packed(8, 64), "layout": "NN"},
    "narrow": {"tile": gpu_gemm.Tile(bk=16, bn=32, wm=32, wn=32)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_PRODUCTS)
def test_no_index_of_a_product_on_a_gpu_leaves_its_type(case: str, dtype: DType) -> None:
    options = {"layout": "NT", **GPU_PRODUCTS[case]}
    layout = options.pop("layout")
    tile = options.get("tile") or gpu_gemm.default_tile("cuda", 512, 512, dtype)
    launch = gpu_gemm.product("cuda", layout, 512, 512, 512, dtype, **{**options, "tile": tile})
    columns = f"({tile.bn} / 2)" if "gated" in options else str(tile.bn)
    known: Known = {
        "first * tiles_n": TO_MOST, "bx - (first * tiles_n)": TO_MOST,
        "tiles_m - first": (1, MOST), f"(first + (in_band % height)) * {tile.bm}": TO_MOST,
        f"(in_band / height) * {columns}": TO_MOST, "in_term": (0, (MOST - 1) // tile.bk),
        "term": (0, options.get("terms", 1) - 1),
    }  # fmt: skip
    if "turned" in options:
        known["(row % T) * (64 / 2)"] = TO_MOST
    names = "M N K T" if "turned" in options else "M N K"
    z = options.get("split", 1) * options.get("batch", 1) - 1
    assert on_gpu(launch, names, known, z=z) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", gpu_attention.PASSES)
def test_no_index_of_attention_on_a_gpu_leaves_its_type(
    which: gpu_attention.Pass, dtype: DType
) -> None:
    limits = LIMITS["cuda"]
    cut = gpu_attention.default_cut("cuda", which, 64, dtype, limits)
    launch = gpu_attention.attention("cuda", which, 3, 512, 6, 2, 64, dtype, turned=True, cut=cut)
    known: Known = dict.fromkeys(
        ("b * T", "KV * 64", "H * 64", "kv * 64", "h * 64", "head * 64", "kv * (H / KV)",
         "count * (H / KV)", "~.* \\* \\(64 / 2\\)", "~\\(first \\+ \\(.* % count\\)\\) \\* \\d+"),
        TO_MOST,
    )  # fmt: skip
    known["first + count"] = (0, MOST // cut.tile + 1)
    x = (MOST - 1) // cut.own_rows
    assert on_gpu(launch, "B T H KV", known, STARTS, x=x) == []


ROWS_ON_GPU: dict[str, tuple[Callable[[DType], Launch], str, Known, Known, dict[str, int]]] = {
    "adamw": (
        lambda dtype: gpu_adamw.step(
            "cuda", [2**40, 4096], [True, False], dtype, state="bfloat16", copies=[True, False]
        ),
        "", {}, {}, {},
    ),
    "square_sum": (lambda dtype: gpu_adamw.square_sum("cuda", [2**40], dtype), "", {}, {}, {}),
    "narrow": (lambda dtype: gpu_narrow.narrow("cuda", [2**40, 64], dtype), "", {}, {}, {}),
    "delta": (
        lambda dtype: gpu_attention.delta("cuda", 2, 512, 4, 64, dtype),
        "B T H", dict.fromkeys(("B * T", "(B * T) * H", "T * H", "~bx \\* .*"), TO_MOST), {}, {},
    ),
    "rope": (
        lambda dtype: gpu_rope.rope("cuda", 2, 512, 4, 64, dtype),
        "B T HEADS", dict.fromkeys(("~t \\* .*", "~.* \\* HEADS"), TO_MOST), {}, {},
    ),
    "cached parts": (
        lambda dtype: gpu_cached.parts("cuda", 512, 8, 2, 64, dtype, 96),
        "S KV BLOCKS WINDOW",
        {**dict.fromkeys(("bz * 64", "~\\(h \\* BLOCKS\\) \\* .*"), TO_MOST), "BLOCKS": MANY_PARTS},
        {"position": TO_MOST}, {"x": MOST // 128},
    ),
    "cached joined": (
        lambda dtype: gpu_cached.joined("cuda", 512, 8, 2, 64, dtype),
        "S KV BLOCKS", {"~p \\* .*": TO_MOST}, {"position": TO_MOST}, {},
    ),
    "cross_entropy": (
        lambda dtype: gpu_cross_entropy.softmax_loss("cuda", 512, 512, dtype, gradient=True),
        "V", {}, {}, {},
    ),
    "embedding_order": (
        lambda dtype: gpu_embedding.order("cuda", 512, 512),
        "N V", {"~place \\+= .*": TO_MOST}, {}, {"x": (MOST - 1) // 128},  # one more per token
    ),
    "embedding_backward": (
        lambda dtype: gpu_embedding.backward("cuda", 512, 512, 512, dtype),
        "N V H", {}, {"begin": TO_MOST}, {"x": (MOST - 1) // 64, "z": (MOST - 1) // 128},
    ),
    "few_rows": (
        lambda dtype: gpu_few_rows.product("cuda", 8, 512, 512, dtype, dtype),
        "N K", {}, {}, {"x": MOST // 4},
    ),
    "few_rows, packed": (
        lambda dtype: gpu_few_rows.product("cuda", 8, 512, 512, dtype, Packed(4, 64, True)),
        "N K", {}, {}, {"x": MOST // 4},
    ),
    "rms_norm": (
        lambda dtype: gpu_rms_norm.forward("cuda", 512, 8192, dtype, 1e-5), "", {}, {}, {},
    ),
    "rms_norm, gradient": (
        lambda dtype: gpu_rms_norm.backward("cuda", 512, 8192, dtype, addend=True), "N", {}, {},
        {"x": 1055},
    ),
    "column_sum": (
        lambda dtype: gpu_rms_norm.column_sum("cuda", 512, 512), "ROWS H", {}, {},
        {"x": (MOST - 1) // 32},
    ),
    "swiglu": (lambda dtype: gpu_swiglu.forward("cuda", 512, dtype), "COUNT", {}, {}, {}),
    "swiglu, gradient": (
        lambda dtype: gpu_swiglu.backward("cuda", 512, dtype), "COUNT", {}, {}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROWS_ON_GPU)
def test_no_index_of_another_kernel_on_a_gpu_leaves_its_type(case: str, dtype: DType) -> None:
    build, names, known, memory, numbers = ROWS_ON_GPU[case]
    assert on_gpu(build(dtype), names, known, memory, **numbers) == []


def test_every_kernel_of_a_gpu_is_among_them() -> None:
    checked = {build("float32").text for build, *_ in ROWS_ON_GPU.values()}
    files = {path.name for path in (OPS.parent / "gpu").glob("*.c")} - {"gemm.c", "attention.c"}
    for file in files:
        assert any(source(file) in text for text in checked), file


def test_the_blocks_of_a_product_lie_within_it() -> None:
    """Bands of 8 rows of blocks: each block's first row and column are inside C."""
    text = source("gemm.c")
    for line in (
        "const int first = bx / (BAND * tiles_n) * BAND, in_band = bx - first * tiles_n;",
        "const int height = tiles_m - first < BAND ? tiles_m - first : BAND;",
        "const int m0 = (first + in_band % height) * BM, n0 = in_band / height * COLUMNS;",
        "const int tiles_n = (N + COLUMNS - 1) / COLUMNS, tiles_m = (M + BM - 1) / BM;",
    ):
        quoted(text, line)
    bx, tall, wide, q, r, band = z3.Ints("bx tall wide q r band")
    given = (0 <= bx, bx < tall * wide, wide > 0, tall > 0, band > 0)
    euclid = (bx == q * (band * wide) + r, 0 <= r, r < band * wide)  # r is in_band
    proved(q >= 0, *given, *euclid)
    first, height = z3.Ints("first height")
    bands = (first == q * band, q >= 0)
    proved(bx - first * wide == r, *given, *euclid, *bands)
    proved(first < tall, r >= 0, bx == first * wide + r, bx < tall * wide, wide > 0)
    chosen = (first < tall, height == least(tall - first, band))
    proved(z3.And(height >= 1, height <= tall - first), band > 0, *chosen)
    proved(r < height * wide, r < band * wide, r < (tall - first) * wide, wide > 0, *chosen)
    column, row = z3.Ints("column row")
    inside = (r == column * height + row, 0 <= row, row < height, r < height * wide, r >= 0)
    proved(z3.And(column < wide, first + row < tall), *inside, height >= 1, height <= tall - first)
    size, step, tiles, n = z3.Ints("size step tiles n")
    counted = (step > 0, size > 0, (tiles - 1) * step < size, size <= tiles * step)
    proved(n * step < size, *counted, 0 <= n, n < tiles)


def test_the_terms_of_a_sum_are_within_its_steps() -> None:
    """in_term = step - step / STEPS_OF_TERM * STEPS_OF_TERM."""
    text = source("gemm.c")
    quoted(text, "const int term = TERMS == 1 ? 0 : (step) / STEPS_OF_TERM;")
    quoted(text, "const int in_term = (step) - term * STEPS_OF_TERM;")
    step, steps = z3.Ints("step steps")
    proved(z3.And(step % steps < steps, step % steps >= 0), steps > 0, step >= 0)


def test_products_of_sizes_on_a_gpu_are_those_that_are_refused() -> None:
    """What `known` says of attention, its relatives and a cache follows from the products that
    blocks.launch is given."""
    B, T, H, KV, D, x, y = z3.Ints("B T H KV D x y")
    given = (B > 0, T > 0, KV > 0, D > 0, H >= KV)
    # An index below a size, times another size.
    proved(x * y <= B * y, 0 <= x, x < B, y >= 0)
    # Tiles of a head's queries, times the heads that share keys: at most T H.
    count, shared, tile = z3.Ints("count shared tile")
    tiles = (count >= 1, (count - 1) * tile < T, tile > 0, shared >= 1, shared * KV <= H)
    proved(count <= T, *given, *tiles)
    proved(shared <= H, *given, *tiles)
    proved(count * shared <= T * H, count <= T, shared <= H, count >= 1, shared >= 1)
    # The tile behind the last one that begins before T, as its loop has it.
    first = z3.Int("first")
    proved(first + count <= T / tile + 1, (first + count - 1) * tile < T, tile > 0, T > 0)
    quoted(source("attention.c"), "while ((first + count) * TILE < T && starts")


@pytest.mark.parametrize("sizes", [(1 << 30, 2, 64), (2, 1 << 30, 64), (64, 64, 1 << 30)])
def test_a_size_that_is_too_large_is_refused_on_a_gpu(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UnsupportedSize, match="1073741823"):
        gpu_gemm.product("cuda", "NT", *sizes, "bfloat16")
    fewer = [min(size, (1 << 30) - 64) for size in sizes]
    assert gpu_gemm.product("cuda", "NT", fewer[0], fewer[1], fewer[2], "bfloat16").grid[0] > 0


def test_products_of_sizes_that_are_too_large_are_refused_on_a_gpu() -> None:
    attention = functools.partial(gpu_attention.attention, "cuda", "forward")
    for B, T, H in ((1 << 15, 1 << 15, 1), (1, 1 << 24, 1), (1, 16, 1 << 24)):
        with pytest.raises(UnsupportedSize, match="as a size"):
            gpu_attention.attention("metal", "forward", B, T, H, H, 64, "bfloat16")
    with pytest.raises(UnsupportedSize, match="65536 blocks along z; cuda allows 65535"):
        attention(1024, 64, 64, 8, 64, "bfloat16")
    assert attention(1023, 64, 64, 8, 64, "bfloat16").grid == (1, 1, 1023 * 64)
    with pytest.raises(UnsupportedSize, match="as a size"):
        gpu_rope.rope("opencl", 1, 1 << 25, 1, 64, "float32")
    with pytest.raises(UnsupportedSize, match="as a size"):
        gpu_cached.parts("opencl", 1 << 28, 8, 1, 64, "float32")
    with pytest.raises(UnsupportedSize, match="as a size"):
        gpu_attention.delta("metal", 1 << 10, 1 << 12, 1 << 8, 64, "float32")


# ---- that an overflow would be found

OVERFLOW = r" int: -?\d+ to \d+"  # not: a text that clang does not parse
FAULTS = {
    "partial sums of a product, as an int": (
        "panels.h", "? (long)PARTIAL_ROWS * BLOCK_COLS", "? PARTIAL_ROWS * BLOCK_COLS",
        lambda: test_no_index_of_a_product_leaves_its_type("TILE_AVX512", 0, (1, 0, 1), 2, None),
    ),
    "an element of C, as an int": (
        "tile_vector.h", "put(t, sum[i][j], (long)(m + i) * N", "put(t, sum[i][j], (m + i) * N",
        lambda: test_no_index_of_a_product_leaves_its_type("TILE_AVX2", 1, (0, 0, 0), 1, None),
    ),
    "a row of A, as an int": (
        "panels.h", "A + (long)m * K + k0 * PAIR", "A + m * K + k0 * PAIR",
        lambda: test_no_index_of_a_product_leaves_its_type("TILE_AMX", 0, (1, 1, 1), 2, None),
    ),
    "pairs of sequences and heads, as an int": (
        "attention.h", "#define PAIRS ((long)B * KV)", "#define PAIRS (B * KV)",
        lambda: test_no_index_of_attention_leaves_its_type("forward", "TILE_AVX512", 0),
    ),
    "rows of few products, as an int": (
        "int4.h", "#define DOT_FLOATS (8L * K + 9L", "#define DOT_FLOATS (8 * K + 9",
        lambda: test_no_index_of_a_product_with_a_packed_weight_leaves_its_type(
            "TILE_AVX512", 1, 8, 0, 4, 0
        ),
    ),
    "a row of the table, as an int": (
        "embedding_forward.c", "weight + (long)ids[row] * H", "weight + ids[row] * H",
        lambda: test_no_index_of_another_kernel_leaves_its_type("embedding_forward.c", "TILE_AVX2"),
    ),
    "scores of a row, as an int": (
        "cached_attention.c", "p[(long)i * S + slot]", "p[i * S + (int)slot]",
        lambda: test_no_index_of_another_kernel_leaves_its_type("cached_attention.c", "TILE_AVX2"),
    ),
    "windows that are added, as an int": (
        "cached_attention.c", "? s.high[i] - WINDOW : 0;", "? (int)(s.high[i] + 2L * WINDOW) : 0;",
        lambda: test_no_index_of_another_kernel_leaves_its_type("cached_attention.c", "TILE_NEON"),
    ),
    "heads of many sequences, as an int": (
        "cache.h", "position[(head) / (KV / SEQUENCES)]", "position[(int)(head) * SEQUENCES]",
        lambda: test_no_index_of_another_kernel_leaves_its_type("cache_write.c", "TILE_NEON"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_of_too_small_a_type_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, proof = FAULTS[fault]
    with_fault(monkeypatch, file, right, wrong)
    with pytest.raises(AssertionError, match=OVERFLOW):
        proof()


GPU_FAULTS = {
    "an element of C": (
        "const long at = (long)row * N + col;", "const long at = row * N + col;",
        lambda: test_no_index_of_a_product_on_a_gpu_leaves_its_type("plain", "bfloat16"),
    ),
    "a row of a tile": (
        "from + (long)(row0 + row) * ld + col0 + chunk * CHUNK;",
        "from + (row0 + row) * ld + col0 + chunk * CHUNK;",
        lambda: test_no_index_of_a_product_on_a_gpu_leaves_its_type("plain", "bfloat16"),
    ),
    "a row of logits": (
        "x += (long)bx * V;", "x += bx * V;",
        lambda: test_no_index_of_another_kernel_on_a_gpu_leaves_its_type(
            "cross_entropy", "float32"
        ),
    ),
    "an element of a tensor": (
        "const long at = ((long)bx * THREADS + tid) * VEC;",
        "const int at = (bx * THREADS + tid) * VEC;",
        lambda: test_no_index_of_another_kernel_on_a_gpu_leaves_its_type("swiglu", "float32"),
    ),
    "a row of a gradient": (
        "dout + (long)order[i] * H + from", "dout + order[i] * H + from",
        lambda: test_no_index_of_another_kernel_on_a_gpu_leaves_its_type(
            "embedding_backward", "float32"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", GPU_FAULTS)
def test_an_index_of_too_small_a_type_on_a_gpu_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, proof = GPU_FAULTS[fault]
    read, found = blocks_of_gpu.source, []

    def changed(file: str) -> str:
        text = read(file)
        found.append(right in text)
        return text.replace(right, wrong)

    monkeypatch.setattr(blocks_of_gpu, "source", changed)
    with pytest.raises(AssertionError, match=OVERFLOW):
        proof()
    assert any(found)


# A function's body with parameters `int n`, up to 1,000, and `long big`, up to 2^40; what is found
# of it, by the first words.
SMALL = "cells[0] >= 0 && cells[0] < 9"
SNIPPETS = {
    "return n * 2200000;": ["n * 2200000 int"],
    "return n * 2100000;": [],
    "return n * 2200000L > 5;": [],
    "int x = big; return x;": ["big as int"],
    "return big < 9 ? big : 9;": [],
    "return big < n ? n - big : 0;": [],
    "if (big >= 7) return 0; return (int)big + 2147483640;": [],
    "if (big >= 9) return 0; return (int)big + 2147483640;": ["big + 2147483640 int"],
    "int s = 0; for (int i = 0; i < n; i++) s = i * 2000000; return s;": [],
    "int s = 0; for (int i = 0; i <= n; i++) s = i * 2148000; return s;": ["i * 2148000 int"],
    "int s = 0; for (int i = 0; i < n; i++) s += 1; return s;": ["s += 1 int"],
    "int k = 0; for (; k + 16 <= n; k += 16) ; return k * 2000000;": [],
    "int k = 0; while (k < n) k += 3; return k * 2000000;": [],
    "int k = n; while (k < 2147483647) k += 3; return k;": ["k += 3 int"],
    "int k = 0; do k++; while (k < n); return k * 2200000;": ["k * 2200000 int"],
    "int k = 1; while (1) { if (k > n) break; k = k * 2; } return k * 1000000;": [],
    "int k = 1; while (1) { if (k > n) break; k *= 2; } return k * 2000000;": ["k * 2000000 int"],
    "unsigned u = n; return (int)(u * 4294967295u) + 1;": ["(u * 4294967295) + 1 int"],
    "return helper(n) * 1000;": [],
    "return helper(n + 1100000) * 1000;": ["(helper(n + 1100000)) * 1000 int"],
    "return array[n * 3000000];": ["n * 3000000 int"],
    "return n ? 5 : 1 << n;": [],
    "int x = n; x = x - 2147483000; x -= 2147483000; return x;": ["x -= 2147483000 int"],
    "for (int a = 0; a < n; a++) for (int b = a; b < n; b++) big = a * b * 2200; return 0;": [
        "(a * b) * 2200 int"
    ],
    "for (int a = 0; a < n; a++) { if (a > 9) continue; big = a * 200000000; } return 0;": [],
    "int x = 1; fill(&x); return x * 2147483647;": ["x * 2147483647 int"],
    "int x = 1; int *p = &x; *p = 2147483647; return x * 2;": ["x * 2 int"],
    "int x = 1; int *p = &x; if (x >= 0 && x < 9) { *p = n; return x * 2; } return 0;": [
        "x * 2 int"
    ],
    "return n * 2 / (n - 500) - 2147483000;": ["((n * 2) / (n - 500)) - 2147483000 int"],
    f"if ({SMALL}) return cells[0] * 200000000; return 0;": [],
    f"if ({SMALL}) {{ cells[0] = 2147483000; return cells[0] * 2; }} return 0;": [
        "cells[0] * 2 int"
    ],
    f"if ({SMALL}) {{ fill(cells); return cells[0] * 2; }} return 0;": ["cells[0] * 2 int"],
    f"if ({SMALL}) for (int i = 0; i < n; i++) {{ big = cells[0] * 2; cells[0] = n; }} return 0;": [
        "cells[0] * 2 int"
    ],
    f"if ({SMALL}) for (int i = 0; i < n; i++) {{ big = cells[0] * 2; fill(cells); }} return 0;": [
        "cells[0] * 2 int"
    ],
}  # fmt: skip
# Statements that are not followed are refused: the first words of why.
REFUSED = {
    "int x = 1; switch (n) { case 1: x = 2147483647; } return x * 2;": "SwitchStmt",
    "int x = 1; if (n > 5) goto end; x = 2; end: return x * 1500000000;": "GotoStmt",
    "int x = 1; back: x += n; if (x < n) goto back; return x;": "LabelStmt",
    'int x = 1; __asm__("" : "+r"(x)); return x * 2;': "asm writes x",
}


@pytest.mark.parametrize("body", SNIPPETS)
def test_the_interpreter_finds_what_overflows_and_nothing_else(body: str) -> None:
    found = problems_of(body)
    assert [problem.split(":")[1].strip() for problem in found] == SNIPPETS[body]


@pytest.mark.parametrize("body", REFUSED)
def test_the_interpreter_refuses_what_it_cannot_follow(body: str) -> None:
    with pytest.raises(AssertionError, match=f"^{REFUSED[body]}"):
        problems_of(body)


def problems_of(body: str) -> list[str]:
    """Problems of a function with this body, and with what the bodies call."""
    text = "extern const int array[];\nextern int cells[];\nvoid fill(int *);\n"
    text += "static int helper(int x) { return x * 2; }\n"
    text += f"int f(int n, long big) {{ {body} }}\n"
    return Ranges(text, {}).problems("f", n=(1, 1000), big=(0, 2**40))
