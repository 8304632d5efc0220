"""The GPU kernels beside products and attention: as CUDA and Metal under emulation, as OpenCL for
real, and compiled by NVIDIA's compiler; faults put into their texts are found."""

import math
from collections.abc import Iterator, Sequence

import gpu_kernels
import numpy as np
import nvrtc
import pytest
from gpu_kernels import Wrong, emulate
from gpu_rows import CASES, same
from nvrtc import ARCHITECTURES, RESERVED
from opencl import needs_opencl, on_opencl, opencl_takes

from tinyllama.ops.gpu import (
    adamw,
    attention,
    cached_attention,
    cross_entropy,
    embedding,
    few_rows,
    rms_norm,
    rope,
    swiglu,
)
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.runtime.blocks import TYPE_CODE, Launch, UnsupportedSize, source

DIALECTS = ("cuda", "metal")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_kernel_equals_its_formula(dialect: str, name: str) -> None:
    assert CASES[name](emulate, dialect, same) == {}


# `make gpu-races` runs all of CASES as OpenCL; here one of each kernel, since pocl compiles slowly.
ON_OPENCL = (
    "rms norm: odd rows", "cross entropy: bfloat16", "swiglu: float16, odd", "rope: float32",
    "embedding: bfloat16", "adamw: float32", "adamw copies: float16, odd",
    "adamw state: bfloat16", "attention delta: float32",
    "few rows: float16, odd", "few rows: 4 bits by 64", "few rows: 8 bits by 64, minimum",
    "cached attention: float32",
)  # fmt: skip


@needs_opencl
def test_on_opencl() -> None:
    assert on_opencl("rows", *ON_OPENCL) == {name: {} for name in ON_OPENCL}


def launches(dialect: str) -> list[Launch]:
    """Every launch of CASES."""
    found: list[Launch] = []

    def note(launch: Launch, arrays: Sequence[np.ndarray]) -> None:
        found.append(launch)

    for case in CASES.values():
        case(note, dialect, same)
    return found


def test_metals_front_end_takes_the_texts() -> None:
    for launch in launches("metal"):
        gpu_kernels.check_address_spaces(launch)


@needs_opencl
def test_opencls_compiler_takes_the_texts_without_a_warning() -> None:
    opencl_takes(launches("opencl"))


# ---- faults ----

# What the fault is: the case that finds it, the text, what replaces it.
MUTANTS = {
    "rms norm: the mean over another width": ("rms norm: float32", "tid) / H + EPS", "tid) + EPS"),
    "rms norm: columns past the end count": (
        "rms norm: odd rows",
        "squares += INSIDE(COLUMN(i)) ? v[k] * v[k] : 0",
        "squares += v[k] * v[k]",
    ),
    "rms norm: columns past the end are written": (
        "rms norm: odd rows",
        "if (INSIDE(COLUMN(i))) STORE(0, partial",
        "STORE(0, partial",
    ),
    "rms norm: the gradient without its pull": (
        "rms norm: float32",
        "* scale - value[j] * pull",
        "* scale",
    ),
    "rms norm: the weight's gradient of the last row alone": (
        "rms norm: float16, more rows than blocks",
        "dw[j] += gradient[j]",
        "dw[j] = gradient[j]",
    ),
    "rms norm: no addend": ("rms norm: odd rows", "result[k] += gradient", "result[k] = gradient"),
    "a block's sum without the groups' barrier": (
        "rms norm: float32",
        "scratch[tid] = x;                                                                     \\\n"
        "    BARRIER;",
        "scratch[tid] = x;",
    ),
    "a block's sum without a barrier before": (
        "cross entropy: bfloat16",
        "BARRIER; /* the numbers of the last time have been read */",
        ";",
    ),
    "a block's sum without its last group": (
        "rms norm: float32",
        "first < THREADS; first += 32",
        "first < THREADS - 32; first += 32",
    ),
    "column sum: groups read the same rows": (
        "rms norm: float32",
        "int row = group; row < ROWS",
        "int row = 0; row < ROWS",
    ),
    "column sum: no barrier": ("rms norm: float32", "part;\n  BARRIER;", "part;"),
    "cross entropy: sums keep the old maximum": (
        "cross entropy: bfloat16",
        "sum *= EXP_LESS(max, higher);",
        "",
    ),
    "cross entropy: threads' sums are not rescaled": (
        "cross entropy: float32",
        "block_sum(sum * EXP_LESS(max, highest)",
        "block_sum(sum",
    ),
    "cross entropy: the target keeps its 1": ("cross entropy: float32", "* scale - hit", "* scale"),
    "cross entropy: an untrained row has a gradient": (
        "cross entropy: float32",
        "v[k] = trained ?",
        "v[k] = 1 ?",
    ),
    "cross entropy: a target beyond the vocabulary is trained": (
        "cross entropy: without gradient",
        "target >= 0 && target < V",
        "target >= 0",
    ),
    "cross entropy: the loss from another thread": (
        "cross entropy: float32",
        "target / VEC % THREADS",
        "target % (THREADS - 1)",
    ),
    "swiglu: the gradient without 1 - s": (
        "swiglu: float32",
        "(1 + g[k] * (1 - s))",
        "(1 + g[k])",
    ),
    "swiglu: up for gate": ("swiglu: float32", "u[k] = gradient * g", "u[k] = gradient * u"),
    "swiglu: written past the end": ("swiglu: float16, odd", "|| at < COUNT", "|| 1"),
    "rope: the gradient turns forwards": ("rope: float32", "? -s[k] : s[k]", "? s[k] : s[k]"),
    "rope: the position of another head": (
        "rope: float32",
        "n / (ACROSS * HEADS) % T",
        "n / ACROSS % T",
    ),
    "rope: the half that is not written": (
        "rope: bfloat16",
        "STORE(TYPE, y + at + HALF, b);",
        "",
    ),
    "attention's delta: by time before heads": (
        "attention delta: float32",
        "(mine / (T * H)) * H + mine % H) * T + mine / H % T",
        "(mine / (T * H)) * T + mine / H % T) * H + mine % H",
    ),
    "attention's delta: no barrier": (
        "attention delta: bfloat16",
        "= part;\n  BARRIER;\n  const",
        "= part;\n  const",
    ),
    "attention's delta: written past the end": (
        "attention delta: float32",
        "tid < PER_BLOCK && mine < ROWS",
        "tid < PER_BLOCK",
    ),
    "embedding: tokens of one id in any order": (
        "embedding: float32",
        "id + (first + j < n)",
        "id + (first + j > n)",
    ),
    "embedding: no barrier before a tile": (
        "embedding: float32",
        "BARRIER;\n    tile[tid] =",
        "tile[tid] =",
    ),
    "embedding: the next entry's first token too": (
        "embedding: bfloat16",
        "i < begin[e + 1]",
        "i <= begin[e + 1] && i < N",
    ),
    "embedding: no barrier after the search": (
        "embedding: bfloat16",
        "begin[tid] = low;\n  BARRIER;",
        "begin[tid] = low;",
    ),
    "embedding: the search is one off": (
        "embedding: float32",
        "below ? middle + 1 : low",
        "below ? middle : low; if (below && high - low == 1) high = low; low = low",
    ),
    "embedding: rows past the table are written": (
        "embedding: float16, odd",
        "if (v0 + e < V && col < H)",
        "if (col < H)",
    ),
    "adamw: the decay of a parameter that has none": (
        "adamw: float32",
        "decays ? lr * scalars[4] : 0",
        "lr * scalars[4]",
    ),
    "adamw: the square without its correction": ("adamw: float32", "* root + eps", "+ eps"),
    "adamw: the tensor before": ("adamw: float32", "bx >= its_first", "bx > its_first"),
    "adamw: written past the end": (
        "adamw: bfloat16, odd", "if (at < count && scale != 0) {", "if (scale != 0) {",
    ),
    "adamw: the copy holds what was": (
        "adamw copies: bfloat16",
        "parameter[k] -= step * mean[k]",
        "if (copy) STORE(COPY_T, copy + at, parameter); copy = 0; parameter[k] -= step * mean[k]",
    ),
    "adamw: the copy of the tensor before": (
        "adamw copies: bfloat16", "copy = its_copy,", "copy = its_copy ? its_copy : copy,",
    ),
    "adamw: one random number for both moments": (
        "adamw state: bfloat16", "rounded_randomly(square[k], bits >> 16)",
        "rounded_randomly(square[k], bits & 0xffff)",
    ),
    "adamw: the indices of the first parameter": (
        "adamw state: bfloat16", "begin = firsts[number]", "begin = firsts[0]",
    ),
    "adamw: neighbours share a random number": (
        "adamw state: bfloat16", "begin + (u32)at + k", "begin + (u32)at",
    ),
    "squares: what parts held is forgotten": ("adamw: float32", "sum += parts[bx];", ""),
    "squares: blocks sum the same numbers": (
        "adamw: float32",
        "((long)bx * THREADS + tid) * VEC; at < count",
        "((long)tid) * VEC; at < count",
    ),
    "few rows: the neighbour's weights": (
        "few rows: bfloat16",
        "(n0 + (e) < N ? n0 + (e) : N - 1)",
        "(n0 + 1 < N ? n0 + 1 : N - 1)",
    ),
    "few rows: lanes past the end count": (
        "few rows: float32",
        "inside ? in[r][i] : 0;\n    }",
        "in[r][i];\n    }",
    ),
    "few rows: written past the end": (
        "few rows: float16, odd",
        "N % (GROUPS * EACH) == 0 || n0 + e < N",
        "1",
    ),
    "few rows: packed numbers without a sign": (
        "few rows: 4 bits by 64",
        "BITS == 4 ? 0x88888888u",
        "BITS == 4 ? 0",
    ),
    "few rows: x is not divided": (
        "few rows: 4 bits by 32, minimum",
        "in[r][i] *= 1 / POWER(i);",
        "",
    ),
    "few rows: the scale of another group": (
        "few rows: 8 bits by 32",
        "(ROW_OF_W(e) + k) / GROUP",
        "(ROW_OF_W(e) + k) / GROUP / 2",
    ),
    "few rows: the minimum is left out": (
        "few rows: 8 bits by 64, minimum",
        "sum[r][e] += WIDEN_2(minima[at]) * total[r];",
        "",
    ),
    "few rows: no addend": ("few rows: float32", "+WIDEN(TYPE, addend[at])", ""),
    "cached attention: a token does not see itself": (
        "cached attention: bfloat16",
        "seen = first + tid <= at",
        "seen = first + tid < at",
    ),
    "cached attention: its own key from the cache": (
        "cached attention: bfloat16",
        "first + slot + i == at ? own",
        "first + slot + i > at ? own",
    ),
    "cached attention: its own value from the cache": (
        "cached attention: bfloat16",
        "first + s == at ? v",
        "first + s > at ? v",
    ),
    "cached attention: keys before the window": (
        "cached attention: a window",
        " && first + tid > at - WINDOW",
        "",
    ),
    "cached attention: the window is one too short": (
        "cached attention: a window",
        "first + tid > at - WINDOW",
        "first + tid > at - WINDOW + 1",
    ),
    "cached attention: the key is not kept": (
        "cached attention: float32",
        "keys[((long)(at / LANES) * D + tid) * LANES + at % LANES] = k[tid];",
        "",
    ),
    "cached attention: parts with their own maxima": (
        "cached attention: float32",
        "EXP2(parts[p * WIDTH + D + 1] - highest)",
        "1",
    ),
    "cached attention: parts beyond the position": (
        "cached attention: float32",
        "position[0] / PART + 1, column",
        "position[0] / PART, column",
    ),
    "cached attention: no barrier before the weights are read": (
        "cached attention: float32",
        "  BARRIER;\n  /* The sum of values",
        "  /* The sum of values",
    ),
    "cached attention: no barrier between heads' scores": (
        "cached attention: bfloat16",
        "    BARRIER;\n    score[h] = 0;",
        "    score[h] = 0;",
    ),
    "cached attention: no barrier between heads": (
        "cached attention: bfloat16",
        "    BARRIER;\n    UNROLL\n    for (int i = 0; i < VEC; i++) sums[subset",
        "    UNROLL\n    for (int i = 0; i < VEC; i++) sums[subset",
    ),
}  # fmt: skip
FILES = (
    "rows.h",
    *(f"{name}.c" for name in (
        "rms_norm_forward", "rms_norm_backward", "column_sum", "cross_entropy", "swiglu", "rope",
        "delta", "embedding_order", "embedding_backward", "adamw", "square_sum", "few_rows",
        "cached_attention",
    )),
)  # fmt: skip


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_found(fault: str) -> None:
    case, old, new = MUTANTS[fault]
    assert any(old in source(file) for file in FILES)
    try:
        found = CASES[case](emulate, "cuda", lambda text: text.replace(old, new))
    except Wrong:
        found = {"all": math.inf}
    assert found != {}


# ---- CUDA ----


def sizes_of_models() -> Iterator[tuple[str, Launch]]:
    """Launches of a step of the 124m model at 8 x 1024 tokens, and of generation at 7B's sizes."""
    for dtype in ("bfloat16", "float32"):
        for H in (768, 4096, 8192):
            yield f"rms norm {H} {dtype}", rms_norm.forward("cuda", 8192, H, dtype, 1e-5)
            yield (
                f"rms norm's gradient {H} {dtype}",
                rms_norm.backward("cuda", 8192, H, dtype, addend=True),
            )
        for V in (32000, 50257):
            launch = cross_entropy.softmax_loss("cuda", 4096, V, dtype, gradient=True)
            yield f"cross entropy {V} {dtype}", launch
        yield f"swiglu's gradient {dtype}", swiglu.backward("cuda", 8192 * 2048, dtype)
        yield f"attention's delta {dtype}", attention.delta("cuda", 8, 1024, 12, 64, dtype)
        yield f"rope {dtype}", rope.rope("cuda", 8, 1024, 12, 64, dtype)
        yield f"embedding {dtype}", embedding.backward("cuda", 8192, 32000, 768, dtype)
        for weight in (dtype, Packed(4, 64), Packed(4, 32, True), Packed(8, 32)):
            for R in (1, 8):
                launch = few_rows.product("cuda", R, 32000, 4096, dtype, weight)
                yield f"{R} rows {weight} {dtype}", launch
        for shared in (1, 8):
            launch = cached_attention.parts("cuda", 4096, 32, 32 // shared, 128, dtype)
            yield f"cached attention, {shared} per key, {dtype}", launch
        yield f"joined {dtype}", cached_attention.joined("cuda", 4096, 32, 8, 128, dtype)
    yield "column sum", rms_norm.column_sum("cuda", 1056, 768)
    yield "embedding's order", embedding.order("cuda", 8192, 32000)
    counts = [32000 * 768, *[768 * 768] * 63]
    yield "adamw", adamw.step("cuda", counts, [True] * 64)
    yield "squares", adamw.square_sum("cuda", counts, accumulate=True)


LAUNCHES = dict(sizes_of_models())


@nvrtc.needed
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_compiles_without_spills(name: str, arch: str) -> None:
    launch = LAUNCHES[name]
    cubin = nvrtc.compile_cubin(launch.text, arch)
    attributes = nvrtc.attributes(cubin)
    assert attributes[nvrtc.FRAME_BYTES] == 0, "spills"
    assert attributes[nvrtc.REGISTERS] * launch.threads <= 65536
    shared = max(0, nvrtc.shared_bytes(cubin) - RESERVED[arch])
    assert shared <= launch.shared_bytes <= 48 << 10


# ---- sizes ----


def test_what_a_kernel_does_not_take_is_said() -> None:
    for build in (
        lambda: rms_norm.forward("cuda", 1, 8224, "float32", 1e-5),
        lambda: few_rows.product("cuda", 9, 64, 64, "float32", "float32"),
        lambda: few_rows.product("cuda", 1, 64, 96, "float32", Packed(4, 64)),
        lambda: few_rows.product("cuda", 1, 64, 96, "float32", Packed(4, 16)),
        lambda: cached_attention.parts("cuda", 8, 16, 1, 64, "float32"),
        lambda: cached_attention.parts("cuda", 8, 2, 2, 192, "float32"),
        lambda: adamw.step("metal", [4] * 8, [True] * 8),
    ):
        with pytest.raises(UnsupportedSize):
            build()


@pytest.mark.parametrize("dialect", adamw.MOST_TENSORS)
def test_as_many_tensors_as_a_launch_takes(dialect: str) -> None:
    count = adamw.MOST_TENSORS[dialect]
    launch = adamw.step(dialect, [4] * count, [True] * count)
    allowed = {"metal": 31, "opencl": 1024 // 8, "cuda": 4096 // 8}  # pointers
    assert len(launch.arguments) == 4 * count + 1 <= allowed[dialect]


@pytest.mark.parametrize("dtype", TYPE_CODE)
def test_a_row_is_cut_evenly_where_it_can_be(dtype: str) -> None:
    launch = rms_norm.forward("cuda", 1, 768, dtype, 1e-5)
    assert 768 // (8 if dtype != "float32" else 4) % launch.threads == 0
