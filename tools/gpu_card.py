"""The first minutes on an NVIDIA card: what is right, how fast it is, and beside what.

python tools/gpu_card.py --out FOLDER                  every stage, 15 minutes at most
python tools/gpu_card.py --out FOLDER --stages products,step
python tools/gpu_card.py --out FOLDER --tiny           small sizes, for a try
python tools/gpu_card.py --out FOLDER --compile-only   no card: every kernel is compiled for sm_90

Stages, each a process with a limit of its own, whose results are kept if it is stopped:

    products   every shape of 124m and 7b in several tilings, checked on rows against float64
    together   products that share a launch in a step of 124m: q, k and v, gate and up, gradients
    attention  forward, gradients of q, and of k and v; one document per row and several
    int4       products with packed weights
    decoding   one row times the weights of 7b, bfloat16 and 4 bits: bytes per second
    library    the same products and attention by PyTorch
    losses     20 steps of a small model beside the processor's
    step       124m, 8 x 1024: bfloat16 and float32, first loss with cold and with warm caches
    profile    the same step kernel by kernel
    peers      the same beside PyTorch, eager and compiled; LoRA beside peft; QLoRA beside LoRA

Each result is one line of FOLDER/results.jsonl at once; FOLDER/table.txt is the summary, printed at
the end. PyTorch is used where it is installed. DEV must not be set; the card is CUDA's first.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from tinyllama.system import device

ROOT = Path(__file__).resolve().parents[1]
# Stages and the seconds that each may take.
STAGES = {
    "products": 150, "together": 50, "attention": 60, "int4": 40, "decoding": 30, "library": 60,
    "losses": 60, "step": 120, "profile": 90, "peers": 240,
}  # fmt: skip
ARCH = "sm_90"  # with --compile-only
# How much longer stages may take; without a card nothing is in a hurry.
PATIENCE = {"card": 1, "tiny": 10, "compile": 10}


# ---- what is measured


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product; `times` in a step of 124m with 8 x 1024 tokens, 0 for those of 7b."""

    layout: str
    M: int
    N: int
    K: int
    times: int = 0

    def name(self) -> str:
        return f"{self.layout} {self.M} x {self.N} x {self.K}"


H, INNER, V, ROWS, CHUNK = 768, 3072, 32000, 8192, 4096  # CHUNK: tokens per piece of the head
SHAPES = (
    Shape("NT", ROWS, H, H, 48), Shape("NT", ROWS, INNER, H, 24), Shape("NT", ROWS, H, INNER, 12),
    Shape("NN", ROWS, H, H, 48), Shape("NN", ROWS, H, INNER, 24), Shape("NN", ROWS, INNER, H, 12),
    Shape("TN", H, H, ROWS, 48), Shape("TN", INNER, H, ROWS, 24), Shape("TN", H, INNER, ROWS, 12),
    Shape("NT", CHUNK, V, H, 2), Shape("NN", CHUNK, H, V, 2), Shape("TN", V, H, CHUNK, 2),
    Shape("NT", 2048, 4096, 4096), Shape("NT", 2048, 11008, 4096), Shape("NT", 2048, 4096, 11008),
    Shape("NN", 2048, 4096, 4096), Shape("TN", 4096, 4096, 2048),
)  # fmt: skip
TINY_SHAPES = (
    Shape("NT", 200, 264, 160, 2),
    Shape("NN", 136, 264, 160),
    Shape("TN", 264, 136, 200),
)
# Ways to cut a product up, as changes of the tile that is taken today; the first are the likeliest.
TILES: dict[str, tuple[dict[str, Any], ...]] = {
    "bfloat16": (
        {}, {"pipelined": True}, {"bk": 64, "pipelined": True}, {"wn": 32},
        {"bn": 256, "bk": 64, "blocks": 1, "pipelined": True},
        {"bn": 192, "wn": 48, "bk": 64, "blocks": 1, "pipelined": True},
        {"bm": 256, "bk": 64, "blocks": 1, "pipelined": True},
        {"bn": 256, "stages": 4, "blocks": 1},
    ),
    "float32": (
        {}, {"unroll": 0}, {"bk": 32}, {"wn": 32, "blocks": 1},
        {"bk": 32, "wn": 32, "blocks": 1}, {"wn": 32, "stages": 4, "blocks": 1},
    ),
}  # fmt: skip
# (B, T, H, KV, D)
ATTENTION = ((8, 1024, 12, 12, 64), (8, 1024, 12, 4, 64), (4, 2048, 12, 12, 64),
             (1, 2048, 32, 32, 128))  # fmt: skip
TINY_ATTENTION = ((2, 192, 2, 1, 64), (1, 128, 1, 1, 128))
CUTS = ((64, 64, 2, 3), (64, 64, 2, 2), (64, 32, 2, 3), (64, 32, 1, 2), (128, 64, 2, 1))
INT4 = tuple(Shape(layout, m, n, k) for m in (512, 2048) for layout, n, k in
             (("NT", 4096, 4096), ("NT", 11008, 4096), ("NN", 4096, 11008)))  # fmt: skip
TINY_INT4 = (Shape("NT", 136, 192, 256), Shape("NN", 136, 192, 256))
GROUP = 64
# Launches that compute several products: how often in a step of 124m, options of gemm.product.
TOGETHER: dict[str, tuple[Shape, dict[str, Any]]] = {
    "q, k and v": (Shape("NT", ROWS, H, H, 12), {"batch": 3}),
    "gate and up": (Shape("NT", ROWS, INNER, H, 12), {"gated": True}),
    "gradients of gate and up": (Shape("NN", ROWS, INNER, H, 12), {"ungated": True}),
    "gradient of q, k and v's input": (Shape("NN", ROWS, H, H, 12), {"terms": 3}),
    "gradient of gate and up's input": (Shape("NN", ROWS, H, INNER, 12), {"terms": 2}),
    "gradients of q, k and v's weights": (Shape("TN", H, H, ROWS, 12), {"batch": 3}),
    "gradients of gate and up's weights": (Shape("TN", INNER, H, ROWS, 12), {"batch": 2}),
}
HEAD, LENGTH = 64, 1024  # q and k are turned by rotary positions
DECODING = ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096))  # N, K
TINY_DECODING = ((136, 256), (264, 512))
ALLOWED = {"bfloat16": 1e-2, "float32": 5e-6}


# ---- results


class Results:
    """Where a stage's results go, at once, and when it must end."""

    def __init__(self, folder: Path, stage: str, mode: str) -> None:
        self.file, self.stage, self.mode = folder / "results.jsonl", stage, mode
        self.tiny = mode == "tiny"
        # Of the types and of the ways to cut, a try takes the first.
        self.dtypes = tuple(TILES)[: 1 if self.tiny else None]
        self.end = time.monotonic() + PATIENCE[mode] * STAGES[stage] - 10

    def limit(self, seconds: float) -> float:
        """How long a process of this stage may take."""
        return PATIENCE[self.mode] * seconds

    def write(self, case: str, what: str, **values: Any) -> None:
        line = {"stage": self.stage, "case": case, "what": what} | values
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def measure(self, case: str, what: str, function: Callable[[], dict[str, Any]]) -> None:
        """Write what `function` returns, or its error; nothing once the time is over."""
        if time.monotonic() > self.end:
            return
        try:
            self.write(case, what, **function())
        except Exception as error:  # one kernel that fails must not cost the others
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.write(case, what, failed=text[:300])


# ---- the card


class Card:
    """Compiles launches, runs them on arrays, times them. In mode `compile` there is no card."""

    def __init__(self, mode: str) -> None:
        from tinygrad.device import Device

        from tinyllama.runtime.patches import install

        device.select({"DEV": "CUDA" if mode != "compile" else f"NULL:CUDA:{ARCH}"})
        install()
        self.runs = mode != "compile"
        self.opened = Device["CUDA" if self.runs else "NULL"]
        self.compiler = self.opened.renderer.compiler
        self.codes: dict[str, bytes | Exception] = {}
        self.random = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)

    def compile(self, launches: Sequence[Any]) -> None:
        """Every launch, on every core; one that fails says so when it is to run."""
        texts = list(dict.fromkeys(launch.text for launch in launches))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.codes = dict(zip(texts, pool.map(self._code_or_error, texts), strict=True))

    def _code_or_error(self, text: str) -> bytes | Exception:
        try:
            code: bytes = self.compiler.compile(text)
        except Exception as error:
            return error
        return code

    def code(self, launch: Any) -> bytes:
        code = self.codes[launch.text]
        if isinstance(code, Exception):
            raise code
        return code

    def facts(self, launch: Any) -> dict[str, Any]:
        from tinyllama.runtime import cubin

        code = self.code(launch)
        found = cubin.attributes(code)
        return {"registers": found[cubin.REGISTERS], "spilled": cubin.spilled_bytes(code)}

    def numbers(self, count: int, start: int) -> np.ndarray:
        """Normally distributed ones, some of them again and again."""
        return np.resize(np.roll(self.random, -start * 8191), count)

    def buffer(self, array: np.ndarray) -> Any:
        from tinygrad import dtypes
        from tinygrad.device import Buffer

        made = Buffer("CUDA", array.nbytes, dtypes.uint8).allocate()
        return made.copyin(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def read(self, buffer: Any, dtype: str) -> np.ndarray:
        data = np.frombuffer(buffer.as_memoryview(), np.uint8)
        return widened(data.view(np.uint16)) if dtype == "bfloat16" else data.view(np.float32)

    def program(self, launch: Any) -> Callable[..., None]:
        program = self.opened.runtime(launch.name, self.code(launch), launch.dynamic_bytes)

        def start(*buffers: Any) -> None:
            pointers = [buffer._buf for buffer in buffers]
            program(*pointers, global_size=launch.grid, local_size=(launch.threads, 1, 1))

        return start

    def milliseconds(self, starts: Sequence[Callable[[], None]]) -> float:
        """Median time of one call; the calls rotate through `starts`, which use other memory."""
        for start in starts:
            start()
        once = self._batch(starts, 3)
        count = max(4, min(50, math.ceil(3 / max(once, 1e-3))))
        return statistics.median(self._batch(starts, count) for _ in range(5))

    def _batch(self, starts: Sequence[Callable[[], None]], count: int) -> float:
        from tinygrad.runtime.autogen import cuda

        events = [cuda.CUevent(), cuda.CUevent()]
        for event in events:
            cuda.cuEventCreate(ctypes.byref(event), 0)
        cuda.cuEventRecord(events[0], None)
        for i in range(count):
            starts[i % len(starts)]()
        cuda.cuEventRecord(events[1], None)
        if failed := cuda.cuEventSynchronize(events[1]):
            raise RuntimeError(f"CUDA error {failed}")
        found = ctypes.c_float()
        cuda.cuEventElapsedTime(ctypes.byref(found), *events)
        for event in events:
            cuda.cuEventDestroy_v2(event)
        return found.value / count


def narrowed(array: np.ndarray) -> np.ndarray:
    """float32 as bfloat16's bits, rounded to nearest even."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def held(array: np.ndarray, dtype: str) -> np.ndarray:
    """What a buffer of a type holds of float32 numbers."""
    return narrowed(array) if dtype == "bfloat16" else array.astype(np.float32)


def wide(array: np.ndarray) -> np.ndarray:
    """What `held` made, in float64."""
    return (widened(array) if array.dtype == np.uint16 else array).astype(np.float64)


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """|found - wanted| / |wanted|; NaN where something was not written."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted)
    return float(difference / np.linalg.norm(wanted))


# ---- products


@dataclasses.dataclass(frozen=True)
class Cut:
    """A product cut up in one way."""

    shape: Shape
    dtype: str
    out: str
    split: int
    label: str
    launch: Any


def cuts(shape: Shape, dtype: str, packed: Any = None) -> Iterator[Cut]:
    """Ways to compute a product; those that the kernel does not take are left out."""
    from tinyllama.ops.gpu import gemm
    from tinyllama.runtime.blocks import Limits, UnsupportedSize, fragments

    base = gemm.default_tile("cuda", shape.M, shape.N, dtype)
    rate = gemm.FLOPS[fragments("cuda", dtype)]
    for change in TILES[dtype] if packed is None else ({}, {"bn": 256, "stages": 4, "blocks": 1}):
        tile = dataclasses.replace(base, **change)
        best = gemm.best_split(shape.M, shape.N, shape.K, tile, 132, rate)
        for split in sorted({1, best} if shape.layout == "TN" or packed is None else {1}):
            out = "float32" if split > 1 or shape.layout == "TN" else dtype
            try:
                launch = gemm.product(
                    "cuda", shape.layout, shape.M, shape.N, shape.K, dtype, out,
                    split=split, tile=tile, packed=packed, limits=Limits(227 << 10),
                )  # fmt: skip
            except (UnsupportedSize, AssertionError):
                continue
            words = ",".join(f"{name}={value}" for name, value in change.items()) or "today"
            yield Cut(shape, dtype, out, split, f"{dtype} {words} /{split}", launch)


def by_waves(groups: Sequence[Sequence[Cut]]) -> Iterator[Cut]:
    """The first of every group, then the second, ...: an early end leaves a whole table."""
    for place in range(max(map(len, groups))):
        yield from (group[place] for group in groups if place < len(group))


def products(card: Card, results: Results) -> None:
    shapes = SHAPES if not results.tiny else TINY_SHAPES
    groups = [list(cuts(shape, dtype)) for shape in shapes for dtype in TILES]
    ordered = list(by_waves([group[: 2 if results.tiny else None] for group in groups]))
    card.compile([cut.launch for cut in ordered])
    for cut in ordered:
        results.measure(cut.shape.name(), cut.label, functools.partial(run_product, card, cut))


@functools.lru_cache(2)
def operands(card: Card, shape: Shape, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    M, N, K = shape.M, shape.N, shape.K
    a = (K, M) if shape.layout == "TN" else (M, K)
    b = (N, K) if shape.layout == "NT" else (K, N)
    return tuple(
        held(card.numbers(math.prod(size), place), dtype).reshape(size)
        for place, size in enumerate((a, b))
    )  # type: ignore[return-value]


def run_product(card: Card, cut: Cut) -> dict[str, Any]:
    facts = card.facts(cut.launch)
    if not card.runs:
        return facts
    a, b = operands(card, cut.shape, cut.dtype)
    shape, start = cut.shape, card.program(cut.launch)
    sets = max(2, min(6, math.ceil(120e6 / (a.nbytes + b.nbytes))))
    inputs = [(card.buffer(a), card.buffer(b)) for _ in range(sets)]
    size = (cut.split, shape.M, shape.N)
    out = card.buffer(np.full(size, np.nan, np.float32) if cut.out == "float32"
                      else np.full(size, 0x7FC0, np.uint16))  # fmt: skip
    start(out, *inputs[0])
    found = card.read(out, cut.out).reshape(size)
    rows = np.linspace(0, shape.M - 1, 8).astype(int)
    left = wide(a[:, rows]).T if shape.layout == "TN" else wide(a[rows])
    right = wide(b).T if shape.layout == "NT" else wide(b)
    error = error_of(found[:, rows].astype(np.float64).sum(0), left @ right)
    ms = card.milliseconds([functools.partial(start, out, *pair) for pair in inputs])
    partial_ms = 8 * shape.M * shape.N * cut.split / 3e9 if cut.split > 1 else 0.0
    speed = 2 * shape.M * shape.N * shape.K / (ms + partial_ms) / 1e9
    return facts | {"ms": ms, "sum_ms": partial_ms, "tflops": speed, "error": error,
                    "times": shape.times, "dtype": cut.dtype}  # fmt: skip


# ---- products that share a launch


def together(card: Card, results: Results) -> None:
    from tinyllama.ops.gpu import gemm

    runs: list[tuple[str, str, Any]] = []
    for name, (shape, options) in TOGETHER.items():
        if results.tiny:
            shape = dataclasses.replace(shape, M=136, N=128, K=72)
        for dtype in results.dtypes:
            out, more = "float32" if shape.layout == "TN" else dtype, dict(options)
            if name == "q, k and v":
                more["turned"] = gemm.Turned(HEAD, LENGTH, 2)
            if shape.layout == "TN":
                count = more["batch"]
                more["tile"], more["split"] = gemm.best_cut(
                    "cuda", shape.M, shape.N, shape.K, dtype, 132, batch=count
                )
            launch = gemm.product(
                "cuda", shape.layout, shape.M, shape.N, shape.K, dtype, out, **more
            )
            run = functools.partial(run_together, card, shape, options, dtype, out, launch)
            runs.append((name, f"{dtype} today", run))
    card.compile([run.args[-1] for _, _, run in runs])
    for name, what, run in runs:
        results.measure(name, what, run)


def run_together(
    card: Card, shape: Shape, options: dict[str, Any], dtype: str, out: str, launch: Any
) -> dict[str, Any]:
    facts = card.facts(launch)
    if not card.runs:
        return facts
    arrays = factors(card, shape, options, dtype)
    count = {"gated": 3, "ungated": 2}.get(next(iter(options)), options.get("batch", 1))
    split = launch.grid[2] // options.get("batch", 1)
    size = (split, shape.M, shape.N)
    empty = np.full(size, np.nan, np.float32)
    results = [card.buffer(held(empty, out) if split == 1 else empty) for _ in range(count)]
    start = functools.partial(card.program(launch), *results, *map(card.buffer, arrays))
    start()
    rows = np.linspace(0, shape.M - 1, 8).astype(int)
    wanted = wanted_together(shape, options, arrays, rows)
    kind = out if split == 1 else "float32"
    found = [card.read(result, kind).reshape(size)[:, rows].sum(0) for result in results]
    error = max(error_of(a, b) for a, b in zip(found, wanted, strict=True))
    ms = card.milliseconds([start])
    return facts | {"ms": ms, "tflops": launch.flops / ms / 1e9, "error": error,
                    "times": shape.times, "dtype": dtype}  # fmt: skip


def factors(card: Card, shape: Shape, options: dict[str, Any], dtype: str) -> list[np.ndarray]:
    """The inputs of such a launch, in their order."""
    M, N, K = shape.M, shape.N, shape.K
    a = (K, M) if shape.layout == "TN" else (M, K)
    b = (N, K) if shape.layout == "NT" else (K, N)
    others = [a if shape.layout == "TN" else b] * (options.get("batch", 1) - 1)
    others += [a, b] * (options.get("terms", 1) - 1)
    others += [b] * ("gated" in options) + [(M, N)] * (2 * ("ungated" in options))
    made = [
        held(card.numbers(math.prod(size), place) / (1 if size == (M, N) else K**0.25), dtype)
        .reshape(size)
        for place, size in enumerate([a, b, *others])
    ]  # fmt: skip
    if options == {"batch": 3} and shape.layout == "NT":
        angles = np.resize(card.numbers(LENGTH * HEAD // 2, 7), (LENGTH, HEAD // 2))
        made += [np.cos(angles), np.sin(angles)]
    return made


def wanted_together(
    shape: Shape, options: dict[str, Any], arrays: Sequence[np.ndarray], rows: np.ndarray
) -> list[np.ndarray]:
    """Those rows of the results, in float64."""
    a, b, *others = (wide(array) for array in arrays)
    if "gated" in options:
        gate, up = a[rows] @ b.T, a[rows] @ others[0].T
        return [gate / (1 + np.exp(-gate)) * up, gate, up]
    if "ungated" in options:
        dy, gate, up = a[rows] @ b, others[0][rows], others[1][rows]
        s = 1 / (1 + np.exp(-gate))
        return [dy * up * s * (1 + gate * (1 - s)), dy * gate * s]
    if "terms" in options:
        pairs = [a, b, *others]
        return [sum(x[rows] @ y for x, y in zip(pairs[::2], pairs[1::2], strict=True))]
    if shape.layout == "TN":
        return [x[:, rows].T @ b for x in (a, *others)]
    *weights, cos, sin = others
    q, k, v = (a[rows] @ x.T for x in (b, *weights))
    return [turned(q, cos, sin, rows), turned(k, cos, sin, rows), v]


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rows: np.ndarray) -> np.ndarray:
    heads = x.reshape(len(x), -1, 2, HEAD // 2)
    c, s = (table[rows % LENGTH][:, None] for table in (cos, sin))
    first, second = heads[:, :, 0], heads[:, :, 1]
    return np.stack([first * c - second * s, second * c + first * s], 2).reshape(x.shape)


# ---- one row times a weight


def decoding(card: Card, results: Results) -> None:
    from tinyllama.ops.gpu import few_rows
    from tinyllama.ops.gpu.gemm import Packed

    runs = []
    for N, K in DECODING if not results.tiny else TINY_DECODING:
        for name, weight in (("bfloat16", "bfloat16"), ("4 bits", Packed(4, GROUP))):
            launch = few_rows.product("cuda", 1, N, K, "bfloat16", weight)
            run = functools.partial(run_decoding, card, N, K, name, launch)
            runs.append((f"1 x {N} x {K}", f"{name} today", run))
    card.compile([run.args[-1] for _, _, run in runs])
    for case, what, run in runs:
        results.measure(case, what, run)


def run_decoding(card: Card, N: int, K: int, name: str, launch: Any) -> dict[str, Any]:
    facts = card.facts(launch)
    if not card.runs:
        return facts
    x = held(card.numbers(K, 0), "bfloat16")
    if name == "bfloat16":
        stored = [held(card.numbers(N * K, 1), "bfloat16").reshape(N, K)]
        weight = wide(stored[0])
    else:
        *stored, weight = packed_weight(card, N, K)
    moved = sum(array.nbytes for array in stored)
    sets = max(2, math.ceil(400e6 / moved)) if N > 1000 else 2  # more than a cache holds
    program, y = card.program(launch), card.buffer(np.full(N, 0x7FC0, np.uint16))
    given = card.buffer(x)
    starts = [functools.partial(program, y, given, *map(card.buffer, stored)) for _ in range(sets)]
    starts[0]()
    error = error_of(card.read(y, "bfloat16"), weight @ wide(x))
    ms = card.milliseconds(starts)
    return facts | {"ms": ms, "gb_per_second": moved / ms / 1e6, "tflops": 2 * N * K / ms / 1e9,
                    "error": error, "dtype": "bfloat16"}  # fmt: skip


def packed_weight(card: Card, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """4-bit numbers, their scales, and the weight (rows, columns) that they stand for."""
    values = np.random.default_rng(1).integers(-7, 8, (rows, columns)).astype(np.int8)
    pairs = (values & 15).astype(np.uint8)
    packed = pairs[:, ::2] | pairs[:, 1::2] << 4
    scales = np.abs(card.numbers(rows * columns // GROUP, 3)).astype(np.float16)
    scales = scales.reshape(rows, -1)
    return packed, scales, values * np.repeat(scales.astype(np.float32), GROUP, 1)


# ---- packed weights


def int4(card: Card, results: Results) -> None:
    from tinyllama.ops.gpu.gemm import Packed

    shapes = INT4 if not results.tiny else TINY_INT4
    groups = [list(cuts(shape, "bfloat16", Packed(4, GROUP))) for shape in shapes]
    ordered = list(by_waves(groups))
    card.compile([cut.launch for cut in ordered])
    for cut in ordered:
        results.measure(cut.shape.name(), cut.label, functools.partial(run_int4, card, cut))


def run_int4(card: Card, cut: Cut) -> dict[str, Any]:
    facts = card.facts(cut.launch)
    if not card.runs:
        return facts
    shape, start = cut.shape, card.program(cut.launch)
    rows, columns = (shape.N, shape.K) if shape.layout == "NT" else (shape.K, shape.N)
    packed, scales, whole = packed_weight(card, rows, columns)
    a = narrowed(card.numbers(shape.M * shape.K, 0)).reshape(shape.M, shape.K)
    weight = wide(narrowed(whole))
    out = card.buffer(np.full((shape.M, shape.N), 0x7FC0, np.uint16))
    given = [card.buffer(array) for array in (a, packed, scales)]
    start(out, *given)
    found = card.read(out, "bfloat16").reshape(shape.M, shape.N)
    checked = np.linspace(0, shape.M - 1, 8).astype(int)
    wanted = wide(a[checked]) @ (weight.T if shape.layout == "NT" else weight)
    ms = card.milliseconds([functools.partial(start, out, *given)])
    speed = 2 * shape.M * shape.N * shape.K / ms / 1e9
    error = error_of(found[checked], wanted)
    return facts | {"ms": ms, "tflops": speed, "error": error, "dtype": "bfloat16"}


# ---- attention


def attention(card: Card, results: Results) -> None:
    from tinyllama.ops.gpu import attention as text
    from tinyllama.runtime.blocks import Limits, UnsupportedSize

    cases = ATTENTION if not results.tiny else TINY_ATTENTION
    runs: list[tuple[str, str, Any]] = []
    for case in cases:
        for dtype in TILES:
            for which in text.PASSES:
                launches = [("today", text.attention("cuda", which, *case, dtype))]
                for cut in CUTS if not results.tiny else CUTS[:1]:
                    try:
                        launch = text.attention(
                            "cuda",
                            which,
                            *case,
                            dtype,
                            cut=text.Cut(*cut),
                            limits=Limits(227 << 10),
                        )
                    except (UnsupportedSize, AssertionError):
                        continue
                    launches.append(("x".join(map(str, cut)), launch))
                name = "B{} T{} H{}/{} D{}".format(*case)
                runs += [(name, f"{dtype} {which} {label}",
                          functools.partial(run_attention, card, case, dtype, which, launch))
                         for label, launch in launches]  # fmt: skip
    card.compile([run.args[4] for _, _, run in runs])
    for name, what, run in runs:
        results.measure(name, what, run)


@functools.lru_cache(2)
def attended(card: Card, case: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
    """Inputs, and for the first row's first head what attention gives, in float64."""
    B, T, HEADS, KV, D = case
    sizes = {"q": HEADS, "k": KV, "v": KV, "dout": HEADS}
    found: dict[str, np.ndarray] = {
        name: held(card.numbers(B * T * heads * D, i), dtype).reshape(B, T, heads, D)
        for i, (name, heads) in enumerate(sizes.items())
    }
    starts = np.zeros((B, T), np.int32)
    starts[:, T // 3 :] = T // 3  # two documents per row
    group = HEADS // KV
    q, dout = (wide(found[name])[0, :, :group].transpose(1, 0, 2) for name in ("q", "dout"))
    k, v = (wide(found[name])[0, :, 0] for name in ("k", "v"))
    at = np.arange(T)
    seen = (at <= at[:, None]) & (at >= starts[0][:, None])
    scores = np.where(seen, q @ k.T / math.sqrt(D), -np.inf)
    sums = np.logaddexp.reduce(scores, -1)
    p = np.exp(scores - sums[..., None])
    out = p @ v
    ds = p * (dout @ v.T - (dout * out).sum(-1)[..., None]) / math.sqrt(D)
    return found | {
        "starts": starts, "out": out, "sums": sums, "dq": ds @ k,
        "dk": (ds.transpose(0, 2, 1) @ q).sum(0), "dv": (p.transpose(0, 2, 1) @ dout).sum(0),
    }  # fmt: skip


def run_attention(
    card: Card, case: tuple[int, ...], dtype: str, which: str, launch: Any
) -> dict[str, Any]:
    facts = card.facts(launch)
    if not card.runs:
        return facts
    B, T, HEADS, KV, D = case
    group, known, start = HEADS // KV, attended(card, case, dtype), card.program(launch)
    # lse is the binary logarithm; other heads than the checked ones get any numbers.
    lse, delta = (np.zeros((B, HEADS, T), np.float32) for _ in range(2))
    lse[0, :group] = known["sums"] / math.log(2)
    delta[0, :group] = (wide(known["dout"])[0, :, :group].transpose(1, 0, 2) * known["out"]).sum(-1)
    heads = KV if which == "gradient_kv" else HEADS
    empty = held(np.full((B, T, heads, D), np.nan, np.float32), dtype)
    if which == "forward":
        outputs = [card.buffer(empty), card.buffer(lse)]
        names = ("q", "k", "v", "starts")
        inputs = [card.buffer(known[name]) for name in names]
    else:
        outputs = [card.buffer(empty) for _ in range(1 if which == "gradient_q" else 2)]
        inputs = [card.buffer(known[name]) for name in ("q", "k", "v", "dout")]
        inputs += [card.buffer(array) for array in (lse, delta, known["starts"])]
    start(*outputs, *inputs)
    first = card.read(outputs[0], dtype).reshape(empty.shape)[0]
    if which == "gradient_kv":
        second = card.read(outputs[1], dtype).reshape(empty.shape)[0]
        errors = [error_of(first[:, 0], known["dk"]), error_of(second[:, 0], known["dv"])]
    else:
        wanted = known["out" if which == "forward" else "dq"]
        errors = [error_of(first[:, :group].transpose(1, 0, 2), wanted)]
    ms = card.milliseconds([functools.partial(start, *outputs, *inputs)])
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return facts | {"ms": ms, "tflops": launch.flops / ms / 1e9, "error": error, "dtype": dtype}


# ---- PyTorch's library


def library(results: Results) -> None:
    import torch

    tiny = results.tiny
    for name in TILES:
        dtype = getattr(torch, name)
        for shape in TINY_SHAPES if tiny else SHAPES:
            run = functools.partial(library_product, shape, dtype)
            results.measure(shape.name(), f"{name} torch", run)
        for case in TINY_ATTENTION if tiny else ATTENTION:
            label = "B{} T{} H{}/{} D{}".format(*case)
            for what, back in (("forward", False), ("backward", True)):
                run = functools.partial(library_attention, case, dtype, back)
                results.measure(label, f"{name} torch {what}", run)


def library_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def library_ms(call: Callable[[], Any]) -> float:
    import torch

    call()
    if library_device() == "cpu":
        return 0.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(5):
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 10)
    return statistics.median(found)


def library_product(shape: Shape, dtype: Any) -> dict[str, Any]:
    import torch

    M, N, K = shape.M, shape.N, shape.K
    a = torch.randn((K, M) if shape.layout == "TN" else (M, K), device=library_device())
    b = torch.randn((N, K) if shape.layout == "NT" else (K, N), device=library_device())
    left = (a.T if shape.layout == "TN" else a).to(dtype)
    right = (b.T if shape.layout == "NT" else b).to(dtype)
    ms = library_ms(lambda: left @ right)
    return {"ms": ms, "tflops": 2 * M * N * K / max(ms, 1e-9) / 1e9, "times": shape.times}


def library_attention(case: tuple[int, ...], dtype: Any, back: bool) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    B, T, HEADS, KV, D = case
    q, k, v = (torch.randn(B, n, T, D, device=library_device()).to(dtype).requires_grad_()
               for n in (HEADS, KV, KV))  # fmt: skip

    def forward() -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=HEADS != KV)

    if not back:
        return {"ms": library_ms(forward)}
    out = forward()
    dout = torch.randn_like(out)
    return {"ms": library_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))}


# ---- whole steps

TRAIN = """
import json, sys
from tinyllama.system import device
device.select()
import numpy as np
from tinyllama.config import LlamaConfig, TrainingConfig
from tinyllama.data.batches import Batch
from tinyllama.model.llama import Llama
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep
from tinygrad import dtypes
sizes = dict(vocab_size=512, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2)
model = Llama(LlamaConfig(**sizes, intermediate_size=512, max_seq_len=128), seed=5,
              dtype=getattr(dtypes, sys.argv[1]))
step = TrainStep(model, AdamW(model.state_dict(), TrainingConfig(learning_rate=3e-3)), 1)
random, losses = np.random.default_rng(1), []
for n in range(1, 21):
    tokens = random.integers(0, 512, (4, 128)).astype(np.int32)
    targets, starts = (tokens * 7 + 1) % 512, np.zeros_like(tokens)
    targets[1, 9], starts[1, 40:] = -1, 40
    losses.append(step([Batch(tokens, targets, starts)], n, 3e-3).loss)
print(json.dumps(losses))
"""
# Runs a step kernel by kernel, and sums their seconds by name.
PROFILE = """
import collections, json, sys, time
from tinyllama.system import device
device.select()
import numpy as np
from tinygrad.runtime.ops_cuda import CUDAProgram
from tinyllama.config import config_from_toml
from tinyllama.data.batches import Batch
from tinyllama.model.build import build_random
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep
config = config_from_toml(open(sys.argv[1]).read(), sys.argv[1], sys.argv[2:])
model, trained, _ = build_random(config, 0)
step = TrainStep(model, AdamW(trained, config.training), 1)
shape = config.training.micro_batch, config.context_length
tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
batch = Batch(tokens, np.roll(tokens, -1, 1), np.zeros_like(tokens))
step([batch], 1, 1e-4)
seconds, times = collections.Counter(), collections.Counter()
run = CUDAProgram.__call__
def timed(program, *buffers, **options):
    took = run(program, *buffers, **options | {"wait": True})
    seconds[program.name] += took or 0.0
    times[program.name] += 1
    return took
CUDAProgram.__call__ = timed
step([batch], 2, 1e-4)
print(json.dumps([[name, times[name], s] for name, s in seconds.most_common()]))
"""


def child(code: str, *words: str, seconds: float, **variables: str) -> str:
    """What a Python process prints last. Raises RuntimeError with the last line of its errors."""
    command = [sys.executable, "-c", code, *words] if code else [sys.executable, *words]
    target = variables.pop("DEV", "CUDA")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=seconds,
        env=device.environment_of(target) | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip().splitlines() or ["nothing printed"])[-1])
    return done.stdout.strip().splitlines()[-1]


def losses(results: Results) -> None:
    for dtype in results.dtypes:
        allowed = {"float32": 1e-5, "bfloat16": 2e-3}[dtype]

        def compare(dtype: str = dtype, allowed: float = allowed) -> dict[str, Any]:
            here, there = (json.loads(child(TRAIN, dtype, seconds=results.limit(50), DEV=target))
                           for target in ("CPU", "CUDA"))  # fmt: skip
            worst = max(abs(a - b) for a, b in zip(here, there, strict=True))
            return {"difference": worst, "allowed": allowed, "last": there[-1]}

        results.measure("20 steps", dtype, compare)


def bench(results: Results, *words: str, seconds: float, **variables: str) -> dict[str, Any]:
    sizes = ["--batch", "8", "--context", "1024"]
    config = "124m"
    if results.tiny:
        config, sizes = "demo", ["--batch", "2", "--context", "64", "--set", "model.num_layers=1"]
    words = ("-m", "tinyllama.bench", config, *sizes, "--json", *words)
    found: dict[str, Any] = json.loads(child("", *words, seconds=seconds, **variables))
    return found


def step(results: Results) -> None:
    for dtype in results.dtypes:
        cache = results.file.with_name(f"cold-{dtype}.db")
        cache.unlink(missing_ok=True)
        for what in ("cold", "warm"):

            def run(dtype: str = dtype, cache: Path = cache) -> dict[str, Any]:
                words = ("--dtype", dtype, "--steps", "10")
                return bench(results, *words, seconds=results.limit(70), CACHEDB=str(cache))

            results.measure("124m 8 x 1024", f"{dtype} {what}", run)


def profile(results: Results) -> None:
    config, sizes = "configs/124m.toml", (8, 1024)
    if results.tiny:
        config, sizes = "configs/demo.toml", (2, 64)
    for dtype in results.dtypes:

        def run(dtype: str = dtype) -> dict[str, Any]:
            overrides = (f"training.dtype={dtype}", f"training.batch_size={sizes[0]}",
                         f"data.context_length={sizes[1]}")  # fmt: skip
            kernels = json.loads(
                child(PROFILE, config, *overrides, seconds=results.limit(60), JIT="2")
            )
            total = sum(seconds for _, _, seconds in kernels)
            return {"ms": 1e3 * total, "kernels": sum(n for _, n, _ in kernels),
                    "slowest": [[n, c, round(1e3 * s, 3)] for n, c, s in kernels[:40]]}  # fmt: skip

        results.measure("124m 8 x 1024", dtype, run)


def peers(results: Results) -> None:
    lora = ("--set", "lora.rank=16")
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("bfloat16 torch", ("--dtype", "bfloat16", "--peer", "torch")),
        ("float32 torch", ("--dtype", "float32", "--peer", "torch")),
        ("bfloat16 torch-compile", ("--dtype", "bfloat16", "--peer", "torch-compile")),
        ("bfloat16 LoRA torch", ("--dtype", "bfloat16", *lora, "--peer", "torch")),
        ("bfloat16 QLoRA beside LoRA", ("--dtype", "bfloat16", *lora, "--set",
                                        "qlora.block_size=64", "--peer", "lora")),
    ]  # fmt: skip
    for what, words in cases:
        if "torch" in what and importlib.util.find_spec("torch") is None:
            results.write("124m 8 x 1024", what, failed="PyTorch is not installed")
            continue
        run = functools.partial(bench, results, *words, "--steps", "8", seconds=90)
        results.measure("124m 8 x 1024", what, run)


# ---- the summary


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The results in a few lines each."""
    text: list[str] = []
    good = [line for line in lines if "failed" not in line]
    for stage in ("products", "together", "int4", "decoding", "attention"):
        text += _fastest(stage, good)
    for line in good:
        if line["stage"] == "losses":
            text.append(f"losses {line['what']}: {line['difference']:.1e} of {line['allowed']:.0e}")
        if line["stage"] in ("step", "peers") and "tokens_per_second" in line:
            text.append(
                f"{line['stage']} {line['what']}: {line['tokens_per_second']:.0f} tokens/s, first "
                f"loss {line['first_loss_seconds']:.1f} s, {line['kernels_per_step']} kernels, "
                f"{(line['peak_memory_bytes'] or 0) / 1e9:.2f} GB, ratio {line.get('ratio')}"
            )
        if line["stage"] == "profile":
            text.append(f"profile {line['what']}: {line['ms']:.1f} ms in {line['kernels']} kernels")
            text += [f"  {ms:9.3f} ms {count:5} {name}" for name, count, ms in line["slowest"][:25]]
    failed = [line for line in lines if "failed" in line]
    text.append(f"failed: {len(failed)}")
    text += [f"  {f['stage']} {f['case']} {f['what']}: {f['failed']}" for f in failed[:20]]
    return "\n".join(text)


def _fastest(stage: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    """For each case and type: today's way, the fastest right one, PyTorch's."""
    mine = [line for line in lines if line["stage"] == stage and "ms" in line]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in mine:
        words = line["what"].split()
        groups[line["case"], " ".join(words[: 2 if stage == "attention" else 1])].append(line)
    text, totals = [], defaultdict(float)
    for (case, kind), found in groups.items():
        right = [line for line in found if line["error"] < ALLOWED[line["dtype"]]]
        if not right:
            text.append(f"{stage} {case} {kind}: WRONG, errors {[f['error'] for f in found][:4]}")
            continue
        best = min(right, key=lambda line: line["ms"])
        today = next((line for line in right if "today" in line["what"]), best)
        theirs = [line["ms"] for line in lines if line["stage"] == "library"
                  and line["case"] == case and line["what"].startswith(kind)]  # fmt: skip
        text.append(
            f"{stage} {case} {kind}: today {today['ms']:.3f} ms {today['tflops']:.0f} TFLOP/s, "
            f"best {best['ms']:.3f} {best['tflops']:.0f} ({best['what']}), torch {theirs}, "
            + (f"{best['gb_per_second']:.0f} GB/s, " if "gb_per_second" in best else "")
            + f"error {best['error']:.0e}"
        )
        for name, line in (("today", today), ("best", best)):
            totals[kind, name] += line.get("times", 0) * (line["ms"] + line.get("sum_ms", 0))
    text += [f"{stage} of a step, {kind} {name}: {ms:.1f} ms" for (kind, name), ms in totals.items()
             if ms]  # fmt: skip
    return text


# ---- processes


def run_stage(folder: Path, stage: str, mode: str) -> None:
    results = Results(folder, stage, mode)
    kernels = {"products": products, "together": together, "attention": attention, "int4": int4,
               "decoding": decoding}  # fmt: skip
    if stage in kernels:
        kernels[stage](Card(mode), results)
    elif mode != "compile":
        if stage == "library" and importlib.util.find_spec("torch") is None:
            results.write("PyTorch", "library", failed="PyTorch is not installed")
            return
        others = {"library": library, "losses": losses, "step": step, "profile": profile}
        (others | {"peers": peers})[stage](results)


def watch(folder: Path, stage: str, mode: str) -> None:
    """Run a stage as a process; end it, and all that it started, at its limit."""
    command = [sys.executable, __file__, "--out", str(folder), "--stage", stage, "--mode", mode]
    limit = PATIENCE[mode] * STAGES[stage]
    with (folder / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(limit)
            problem = f"ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"stopped after {limit} s"
    if problem:
        Results(folder, stage, mode).write("the stage", stage, failed=f"{problem}, see {stage}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by commas")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--compile-only", action="store_true", help="no card: compile for sm_90")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=PATIENCE, default="card", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(options.out, options.stage, options.mode)
        return 0
    mode = "compile" if options.compile_only else "tiny" if options.tiny else "card"
    (options.out / "results.jsonl").unlink(missing_ok=True)
    began = time.monotonic()
    for stage in options.stages.split(","):
        watch(options.out, stage, mode)
        print(f"{stage}: done after {time.monotonic() - began:.0f} s", flush=True)
    file = options.out / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    text = table(lines)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return 1 if any("failed" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
