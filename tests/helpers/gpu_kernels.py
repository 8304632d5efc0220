"""Runs the texts of tinyllama/ops/gpu: CUDA and Metal under emulation, OpenCL for real; references.

A runner is a function (launch, arrays) that executes a kernel and changes its outputs in place.
bfloat16 is held as uint16.
"""

import atexit
import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.ops.gpu.attention import attention
from tinyllama.ops.gpu.gemm import Packed, Turned, product
from tinyllama.runtime.blocks import Launch, Limits

EMULATOR = Path(__file__).resolve().parents[1] / "ops" / "gpu"
GUARD = 1 << 17  # bytes around an array that a kernel must not touch


class Wrong(Exception):
    """The emulator saw what no kernel may do."""


Runner = Callable[[Launch, Sequence[np.ndarray]], None]


# ---- element types ----


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to nearest even, as the array that a kernel reads."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(x: np.ndarray) -> np.ndarray:
    """An array of a kernel as float64."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def unwritten(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return stored(np.full(shape, np.nan), dtype)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in units of the largest wanted number; infinite for a NaN."""
    with np.errstate(invalid="ignore"):
        worst = np.abs(loaded(found) - wanted).max() / np.abs(wanted).max()
    return float(worst) if math.isfinite(worst) else math.inf


def beyond(
    found: Iterable[np.ndarray], wanted: Iterable[np.ndarray], allowed: float
) -> dict[str, float]:
    """Errors of results, by number, that exceed what is allowed."""
    errors = {str(i): error(a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True))}
    return {name: value for name, value in errors.items() if not value <= allowed}


# ---- emulation ----


@functools.cache
def folder() -> Path:
    path = tempfile.mkdtemp(prefix="gpu-emulation-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def clang(*words: object) -> None:
    command = ["clang", "--driver-mode=g++", "-std=c++17", "-w", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"


@functools.cache
def emulator() -> Any:
    library = folder() / "libemulator.so"
    clang("-O2", "-fPIC", "-shared", EMULATOR / "emulator.cpp", "-o", library)
    loaded_library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded_library.emulate.restype = ctypes.c_char_p
    loaded_library.cycles_per_bank_read.restype = ctypes.c_double
    return loaded_library


@functools.cache
def emulated_kernel(name: str, text: str) -> Any:
    """The kernel as a library whose `run` takes an array of addresses."""
    emulator()
    dialect = "metal" if "<metal_stdlib>" in text else "cuda"
    first = [] if dialect == "metal" else ["#define EMULATED", '#include "cuda_on_processor.h"']
    last = f'extern "C" void run(void **p) {{ emulator::call({name}, p); }}\n'
    path = folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text("\n".join([*first, text, last]))
    flags = ["-DSHARED=static"] if dialect == "metal" else []
    clang(
        "-O1", "-fno-unroll-loops", "-fPIC", "-shared", f"-I{EMULATOR}", f"-I{EMULATOR / 'metal'}",
        *flags, path.with_suffix(".cpp"), "-o", path.with_suffix(".so"),
    )  # fmt: skip
    return ctypes.CDLL(str(path.with_suffix(".so")))


def emulate(launch: Launch, arrays: Sequence[np.ndarray]) -> None:
    """Run a CUDA or Metal text. Fails if it writes around an array."""
    assert len(arrays) == len(launch.arguments), launch.arguments
    kernel = emulated_kernel(launch.name, launch.text)
    guarded = []
    for array in arrays:
        memory = np.full(array.nbytes + 3 * GUARD, 0xA5, np.uint8)
        start = -memory.ctypes.data % 256 + GUARD
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        guarded.append((memory, start))
    addresses = (ctypes.c_void_p * len(arrays))(*(m.ctypes.data + at for m, at in guarded))
    function = ctypes.cast(kernel.run, ctypes.c_void_p)
    blocks = (launch.grid[0], launch.grid[2])
    failure = emulator().emulate(launch.threads, *blocks, function, addresses)
    if failure:
        raise Wrong(failure.decode())
    for array, (memory, start) in zip(arrays, guarded, strict=True):
        end = start + array.nbytes
        untouched = (memory[:start] == 0xA5).all() and (memory[end:] == 0xA5).all()
        if not untouched:
            raise Wrong("a kernel wrote out of bounds")
        array.reshape(-1).view(np.uint8)[:] = memory[start:end]


def cycles_per_bank_read() -> float:
    """Of the last emulated CUDA kernel's ldmatrix: 1 without bank conflicts, at most 8."""
    return float(emulator().cycles_per_bank_read())


def check_address_spaces(launch: Launch) -> None:
    """Pass a Metal text through clang's front end: no pointer crosses between kinds of memory."""
    path = folder() / f"check_{hashlib.sha256(launch.text.encode()).hexdigest()[:16]}.metal"
    path.write_text(launch.text)
    clang(
        "-x", "c++", "-fsyntax-only", "-DCHECK_ADDRESS_SPACES", "-DSHARED=static threadgroup",
        "-Wno-unknown-attributes", f"-I{EMULATOR / 'metal'}", path,
    )  # fmt: skip


# ---- products ----


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Integers (rows, columns) as bytes; of two 4-bit numbers the first is the lower half."""
    numbers = numbers.astype(np.uint8)
    return numbers if bits == 8 else (numbers[:, ::2] & 15) | numbers[:, 1::2] << 4


def packed_matrix(
    rows: int, cols: int, packed: Packed, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Random arguments b, scales [, minima] of a product, and the matrix that they stand for."""
    count = 1 << packed.bits
    low = 0 if packed.minimum else -count // 2
    numbers = rng.integers(low, low + count, (rows, cols))
    groups = (rows, cols // packed.group)
    scales = (rng.uniform(0.5, 2, groups) / count).astype(np.float16)
    arguments = [pack(numbers, packed.bits), scales]
    matrix = numbers * np.repeat(scales.astype(np.float64), packed.group, 1)
    if packed.minimum:
        minima = rng.uniform(-1, 0, groups).astype(np.float16)
        arguments.append(minima)
        matrix += np.repeat(minima.astype(np.float64), packed.group, 1)
    return arguments, matrix


def product_error(
    run: Runner,
    dialect: str,
    layout: str,
    M: int,
    N: int,
    K: int,
    dtype: str = "float32",
    out: str = "float32",
    *,
    addend: bool = False,
    accumulate: bool = False,
    packed: Packed | None = None,
    split: int = 1,
    change: Callable[[str], str] = str,
    **more: Any,
) -> float:
    """The error of a product of random matrices against float64, see `error`.

    change: applied to the kernel's text before it is run.
    """
    rng = np.random.default_rng(M * N + K)
    launch = product(
        dialect, layout, M, N, K, dtype, out,
        addend=addend, accumulate=accumulate, packed=packed, split=split, **more,
    )  # fmt: skip
    a = stored(rng.standard_normal((K, M) if layout == "TN" else (M, K)), dtype)
    b_shape = (N, K) if layout == "NT" else (K, N)
    if packed:
        arguments, b = packed_matrix(*b_shape, packed, rng)
        b = loaded(stored(b, dtype))  # as the kernel widens it
    else:
        arguments = [stored(rng.standard_normal(b_shape), dtype)]
        b = loaded(arguments[0])
    wanted = (loaded(a).T if layout == "TN" else loaded(a)) @ (b.T if layout == "NT" else b)
    c = unwritten((split, M, N) if split > 1 else (M, N), out)
    if accumulate:
        c = stored(10 * rng.standard_normal((M, N)), out)
        wanted += loaded(c)
    arguments = [c, a, *arguments]
    if addend:
        arguments.append(stored(10 * rng.standard_normal((M, N)), out))
        wanted += loaded(arguments[-1])
    run(replaced(launch, change), arguments)
    return error(c.sum(0) if split > 1 else c, wanted)


def together_errors(
    run: Runner,
    dialect: str,
    what: str,
    M: int,
    N: int,
    K: int,
    dtype: str = "float32",
    change: Callable[[str], str] = str,
    **more: Any,
) -> dict[str, float]:
    """Errors of several products that one launch computes (gemm.c), by the results' names.

    what: sum2, sum3 (NN), batch2, batch3 of NT or TN, gated (NT), ungated (NN), or turned2,
    turned3, products NT of which all but the last are turned.
    """
    rng = np.random.default_rng(M * N + K)

    def matrix(*shape: int) -> np.ndarray:
        return stored(rng.standard_normal(shape), dtype)

    kind, count = what.rstrip("23"), int(what[-1]) if what[-1] in "23" else 1
    if kind == "sum":
        layout, options = "NN", {"terms": count}
        factors = [matrix(*shape) for _ in range(count) for shape in ((M, K), (K, N))]
        pairs = zip(factors[::2], factors[1::2], strict=True)
        wanted = {"c": sum(loaded(a) @ loaded(b) for a, b in pairs)}
    elif kind == "gated":
        layout, options = "NT", {"gated": True}
        factors = [matrix(M, K), matrix(N, K), matrix(N, K)]
        gate, up = (loaded(factors[0]) @ loaded(b).T for b in factors[1:])
        wanted = {"c": gate / (1 + np.exp(-gate)) * up, "gate": gate, "up": up}
    elif kind == "ungated":
        layout, options = "NN", {"ungated": True}
        factors = [matrix(M, K), matrix(K, N), matrix(M, N), matrix(M, N)]
        dy, (gate, up) = loaded(factors[0]) @ loaded(factors[1]), map(loaded, factors[2:])
        s = 1 / (1 + np.exp(-gate))
        wanted = {"dgate": dy * up * s * (1 + gate * (1 - s)), "dup": dy * gate * s}
    elif kind == "TN batch":
        layout, options = "TN", {"batch": count}
        a, b, *others = [matrix(K, M), matrix(K, N), *(matrix(K, M) for _ in range(count - 1))]
        factors = [a, b, *others]
        wanted = {f"c{i}": loaded(x).T @ loaded(b) for i, x in enumerate([a, *others])}
    else:  # NT batch, turned
        layout, options = "NT", {"batch": count}
        factors = [matrix(M, K), *(matrix(N, K) for _ in range(count))]
        wanted = {f"c{i}": loaded(factors[0]) @ loaded(b).T for i, b in enumerate(factors[1:])}
    if kind == "turned":
        head, length = more.pop("head"), 50
        options["turned"] = Turned(head, length, count - 1)
        angles = rng.uniform(-3, 3, (length, head // 2))
        factors += [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        for name in [*wanted][:-1]:
            heads = np.resize(wanted[name], (1, M, N // head, head))
            turned = turned_back(heads, -np.resize(angles, (M, head // 2)))
            wanted[name] = turned.reshape(M, N)
    split = more.get("split", 1)
    launch = product(dialect, layout, M, N, K, dtype, "float32", **options, **more)
    results = [unwritten((split, M, N), "float32") for _ in wanted]
    if kind == "ungated":  # gate and up have the results' type
        factors[2:] = [loaded(x).astype(np.float32) for x in factors[2:]]
    run(replaced(launch, change), [*results, *factors])
    return {name: error(x.sum(0), wanted[name]) for name, x in zip(wanted, results, strict=True)}


def noted(*cases: Callable[[Runner], object]) -> list[Launch]:
    """The launches of these cases, which do not run."""
    found: list[Launch] = []
    for case in cases:
        case(lambda launch, _: found.append(launch))
    return found


def launches(dialect: str) -> list[Launch]:
    """Every launch of PRODUCTS, TOGETHER and ATTENTION; OpenCL grants 64 KB of local memory."""
    limits = Limits(64 << 10) if dialect == "opencl" else None
    return noted(
        *(functools.partial(run_product, dialect=dialect, name=name) for name in PRODUCTS),
        *(functools.partial(wrong_together, dialect=dialect, name=name) for name in TOGETHER),
        *(
            functools.partial(wrong_attention, dialect=dialect, name=name, limits=limits)
            for name in ATTENTION
        ),
    )


def replaced(launch: Launch, change: Callable[[str], str]) -> Launch:
    return Launch(**{**vars(launch), "text": change(launch.text)})


# ---- attention ----


def attention_errors(
    run: Runner,
    dialect: str,
    B: int,
    T: int,
    H: int,
    KV: int,
    D: int,
    dtype: str = "float32",
    documents: Sequence[int] = (),
    turned: bool = False,
    change: Callable[[str], str] = str,
    **more: Any,
) -> dict[str, float]:
    """Errors of out, lse, dq, dk, dv against the formula in float64; see `error`.

    documents: where the first row's documents begin, after 0; the other rows are one document each.
    """
    rng = np.random.default_rng(T + D)
    q, dout = (stored(rng.standard_normal((B, T, H, D)), dtype) for _ in range(2))
    k, v = (stored(rng.standard_normal((B, T, KV, D)), dtype) for _ in range(2))
    starts = np.zeros((B, T), np.int32)
    for start in documents:
        starts[0, start:] = start
    out, lse = unwritten(q.shape, dtype), np.full((B, H, T), np.nan, np.float32)
    dq, dk, dv = (unwritten(x.shape, dtype) for x in (q, k, v))
    wanted = attention_formula(*map(loaded, (q, k, v, dout)), starts)
    angles = rng.uniform(-3, 3, (T, D // 2))
    places = [starts]
    if turned:
        places += [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        wanted |= {name: turned_back(wanted[name], angles) for name in ("dq", "dk")}

    def start(which: str, *arrays: np.ndarray) -> None:
        launch = attention(dialect, which, B, T, H, KV, D, dtype, turned=turned, **more)
        run(replaced(launch, change), [*arrays, *places])

    start("forward", out, lse, q, k, v)
    with np.errstate(invalid="ignore"):  # a wrong kernel's results may be infinite
        delta = (loaded(dout) * loaded(out)).sum(-1).swapaxes(1, 2)
    delta = np.ascontiguousarray(delta, np.float32)
    start("gradient_q", dq, q, k, v, dout, lse, delta)
    start("gradient_kv", dk, dv, q, k, v, dout, lse, delta)
    lse *= math.log(2)
    return {n: error(x, wanted[n]) for n, x in zip(wanted, (out, lse, dq, dk, dv), strict=True)}


def turned_back(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x (B, T, H, D): pairs that lie D/2 apart, turned by minus `angles` (T, D/2)."""
    half, cos, sin = x.shape[-1] // 2, np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], -1)


def run_forward_on_zeros(run: Runner, dialect: str, T: int, D: int, dtype: str) -> None:
    """Attention's forward pass with one head, for what is counted meanwhile."""
    out, q, k, v = (stored(np.zeros((1, T, 1, D)), dtype) for _ in range(4))
    lse, starts = np.zeros((1, 1, T), np.float32), np.zeros((1, T), np.int32)
    run(attention(dialect, "forward", 1, T, 1, 1, D, dtype), [out, lse, q, k, v, starts])


def attention_formula(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, starts: np.ndarray
) -> dict[str, np.ndarray]:
    """out, lse (natural logarithm), dq, dk, dv in float64; shapes as in blocks.attention."""
    B, T, H, D = q.shape
    KV = k.shape[2]
    keys, values = (np.repeat(x, H // KV, 2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(D)
    at = np.arange(T)
    seen = (at <= at[:, None]) & (at >= starts[:, :, None])
    scores = np.where(seen[:, None], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, -1)
    p = np.exp(scores - lse[..., None])
    out = np.einsum("bhts,bshd->bthd", p, values)
    dp = np.einsum("bthd,bshd->bhts", dout, values)
    delta = np.einsum("bthd,bthd->bht", dout, out)
    ds = p * (dp - delta[..., None]) / math.sqrt(D)

    def shared(x: np.ndarray) -> np.ndarray:
        return x.reshape(B, T, KV, H // KV, D).sum(3)

    return {
        "out": out,
        "lse": lse,
        "dq": np.einsum("bhts,bshd->bthd", ds, keys),
        "dk": shared(np.einsum("bhts,bthd->bshd", ds, q)),
        "dv": shared(np.einsum("bhts,bthd->bshd", p, dout)),
    }


# ---- what is run in every dialect ----

# Arguments of product_error. M, N, K are sizes that no tile divides, in more steps than there are
# places for tiles.
PRODUCTS: dict[str, dict[str, Any]] = {
    "NT bfloat16": {"layout": "NT", "dtype": "bfloat16"},
    "NN float16": {"layout": "NN", "dtype": "float16"},
    "TN bfloat16, split": {"layout": "TN", "dtype": "bfloat16", "split": 4},
    "NT float32": {"layout": "NT"},
    "NN float32, accumulate": {"layout": "NN", "accumulate": True},
    "TN float32, addend": {"layout": "TN", "addend": True},
    "NT bfloat16, addend, narrow": {
        "layout": "NT", "dtype": "bfloat16", "out": "bfloat16", "addend": True,
    },
    "TN float16, accumulate, addend, narrow": {
        "layout": "TN", "dtype": "float16", "out": "float16", "accumulate": True, "addend": True,
    },
    "NT bfloat16, tiles divide": {
        "layout": "NT", "M": 128, "N": 256, "K": 96, "dtype": "bfloat16",
    },
    "NT bfloat16, few columns": {"layout": "NT", "N": 18, "dtype": "bfloat16"},
    "TN float32, few rows": {"layout": "TN", "M": 16, "split": 2},
    "NT bfloat16, 4 bits by 64": {"layout": "NT", "dtype": "bfloat16", "packed": Packed(4, 64)},
    "NN float16, 4 bits by 32, minimum": {
        "layout": "NN", "dtype": "float16", "packed": Packed(4, 32, True),
    },
    "NT float32, 8 bits by 32": {"layout": "NT", "packed": Packed(8, 32)},
    "NN bfloat16, 8 bits by 64, minimum": {
        "layout": "NN", "dtype": "bfloat16", "packed": Packed(8, 64, True),
    },
}  # fmt: skip
# Arguments of together_errors.
TOGETHER: dict[str, dict[str, Any]] = {
    "a sum of two": {"what": "sum2", "M": 133, "N": 152, "K": 168, "dtype": "bfloat16"},
    "a sum of three": {"what": "sum3", "M": 70, "N": 68, "K": 36},
    "three turned": {"what": "turned3", "M": 133, "N": 192, "K": 72, "head": 32},
    "a narrow one turned": {
        "what": "turned2", "M": 133, "N": 32, "K": 72, "head": 32, "dtype": "bfloat16",
    },
    "three of one A": {"what": "NT batch3", "M": 37, "N": 150, "K": 168, "dtype": "bfloat16"},
    "two of one B, split": {"what": "TN batch2", "M": 136, "N": 152, "K": 171, "split": 3},
    "gate and up": {"what": "gated", "M": 133, "N": 150, "K": 72, "dtype": "bfloat16"},
    "gate and up, float32": {"what": "gated", "M": 70, "N": 128, "K": 36},
    "their gradients": {"what": "ungated", "M": 133, "N": 152, "K": 168, "dtype": "float16"},
}  # fmt: skip


def wrong_together(run: Runner, dialect: str, name: str, **more: Any) -> dict[str, float]:
    """Those results of one of TOGETHER that differ by more than rounding."""
    found = together_errors(run, dialect, **TOGETHER[name] | more)
    return {result: value for result, value in found.items() if not value <= 1e-6}


# (M, N, K) by layout: what rows of 16 bytes leave free is odd.
SIZES = {"NT": (133, 150, 168), "NN": (133, 152, 168), "TN": (136, 152, 171)}
PACKED_SIZES = {"NT": (37, 150, 192), "NN": (29, 192, 184)}
# Sums in float32 (of products of TF32's halves, of FMA one after another), and results rounded to 8
# and to 11 bits.
PRODUCT_ERROR = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}


def run_product(run: Runner, dialect: str, name: str, **more: Any) -> float:
    """The error of one of PRODUCTS."""
    case = PRODUCTS[name] | more
    layout = case.pop("layout")
    sizes = (PACKED_SIZES if case.get("packed") else SIZES)[layout]
    M, N, K = (case.pop(size, default) for size, default in zip("MNK", sizes, strict=True))
    return product_error(run, dialect, layout, M, N, K, **case)


def allowed_product_error(name: str) -> float:
    return PRODUCT_ERROR[PRODUCTS[name].get("out", "float32")]


# Arguments of attention_errors. T is a multiple of no tile.
ATTENTION: dict[str, dict[str, Any]] = {
    "float32, D 32, documents": {
        "B": 2, "T": 150, "H": 2, "KV": 1, "D": 32, "documents": (16, 70, 75),
    },
    "bfloat16, D 64, three queries per key": {
        "B": 1, "T": 77, "H": 6, "KV": 2, "D": 64, "dtype": "bfloat16", "documents": (33,),
        "turned": True,
    },
    "float16, D 128": {
        "B": 1, "T": 93, "H": 1, "KV": 1, "D": 128, "dtype": "float16", "documents": (80,),
    },
    "float32, D 128": {"B": 1, "T": 40, "H": 1, "KV": 1, "D": 128, "turned": True},
    "bfloat16, D 80, tiles divide T": {
        "B": 1, "T": 128, "H": 1, "KV": 1, "D": 80, "dtype": "bfloat16",
    },
}  # fmt: skip
ATTENTION_ERROR = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 8e-4}


def wrong_attention(run: Runner, dialect: str, name: str, **more: Any) -> dict[str, float]:
    """Those results of one of ATTENTION that differ from the formula by more than rounding."""
    case = ATTENTION[name] | more
    allowed = dict.fromkeys(
        ("out", "dq", "dk", "dv"), ATTENTION_ERROR[case.get("dtype", "float32")]
    )
    allowed["lse"] = 1e-6  # float32 in every case
    found = attention_errors(run, dialect, **case)
    return {name: value for name, value in found.items() if not value <= allowed[name]}
