"""The GPU kernels beside products and attention: as CUDA and Metal under emulation, as OpenCL for
real, and compiled by NVIDIA's compiler."""

import functools
from collections.abc import Iterator

import gpu_kernels
import nvrtc
import pytest
from gpu_kernels import emulate, noted
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
    narrow,
    rms_norm,
    rope,
    swiglu,
)
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.runtime.blocks import TYPE_CODE, Launch, UnsupportedSize

DIALECTS = ("cuda", "metal")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_kernel_equals_its_formula(dialect: str, name: str) -> None:
    assert CASES[name](emulate, dialect, same) == {}


# `make gpu-races` runs all of CASES as OpenCL; here one of each kernel, since pocl compiles slowly.
ON_OPENCL = (
    "rms norm: odd rows", "cross entropy: bfloat16", "swiglu: float16, odd", "rope: float32",
    "embedding: bfloat16", "adamw: float32", "adamw copies: float16, odd",
    "adamw state: bfloat16", "narrow: bfloat16", "attention delta: float32",
    "few rows: float16, odd", "few rows: 4 bits by 64", "few rows: 8 bits by 64, minimum",
    "cached attention: float32",
)  # fmt: skip


@needs_opencl
def test_on_opencl() -> None:
    assert on_opencl("rows", *ON_OPENCL) == {name: {} for name in ON_OPENCL}


def launches(dialect: str) -> list[Launch]:
    """Every launch of CASES."""
    cases = CASES.values()
    return noted(*(functools.partial(case, dialect=dialect, change=same) for case in cases))


def test_metals_front_end_takes_the_texts() -> None:
    for launch in launches("metal"):
        gpu_kernels.check_address_spaces(launch)


@needs_opencl
def test_opencls_compiler_takes_the_texts_without_a_warning() -> None:
    opencl_takes(launches("opencl"))


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
    yield "narrow", narrow.narrow("cuda", [768 * 768] * 96, "bfloat16")
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
