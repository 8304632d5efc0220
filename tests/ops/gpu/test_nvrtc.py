"""The GPU kernels' texts as CUDA, compiled by NVIDIA's compiler for A100 (sm_80) and H100."""

import nvrtc
import pytest
from nvrtc import ARCHITECTURES, RESERVED

from tinyllama.ops.gpu.attention import PASSES, attention
from tinyllama.ops.gpu.gemm import Packed, Tile, Turned, best_cut, product
from tinyllama.runtime.blocks import FMA, Launch, Limits

pytestmark = nvrtc.needed
SIZES = (8192, 768, 3072)  # of the 124m model at 8 x 1024 tokens


def products() -> dict[str, Launch]:
    found = {}
    for layout in ("NT", "NN", "TN"):
        for dtype in ("bfloat16", "float16", "float32"):
            added = {"accumulate": True} if layout == "TN" else {"addend": True}
            found[f"{layout} {dtype}"] = product("cuda", layout, *SIZES, dtype, **added)
    for layout, dtype, packed in (
        ("NT", "bfloat16", Packed()),
        ("NN", "bfloat16", Packed(4, 32, True)),
        ("NT", "float16", Packed(8, 32)),
        ("NT", "float32", Packed(8, 64, True)),
    ):
        found[f"{layout} {dtype} {packed}"] = product("cuda", layout, *SIZES, dtype, packed=packed)
    for dtype in ("bfloat16", "float16", "float32"):
        found |= several(dtype)
    pipelined = Tile(pipelined=True)
    found["pipelined"] = product("cuda", "NT", *SIZES, "bfloat16", tile=pipelined)
    found["FMA"] = product("cuda", "NT", *SIZES, "float32", fragment=FMA)
    return found


def several(dtype: str) -> dict[str, Launch]:
    """What one launch computes of a 124m step: its sizes and tiles."""
    M, H, inner = SIZES
    cut, split = best_cut("cuda", inner, H, M, dtype, 132, batch=2)
    launches = {
        "gated": product("cuda", "NT", M, inner, H, dtype, gated=True),
        "ungated": product("cuda", "NN", M, inner, H, dtype, ungated=True),
        "q, k, v": product("cuda", "NT", M, H, H, dtype, batch=3, turned=Turned(64, 1024, 2)),
        "their gradient": product("cuda", "NN", M, H, H, dtype, terms=3),
        "of their weights": product("cuda", "TN", H, H, M, dtype, "float32", batch=3),
        "of gate and up": product(
            "cuda", "TN", inner, H, M, dtype, "float32", batch=2, tile=cut, split=split
        ),
    }
    return {f"{name}, {dtype}": launch for name, launch in launches.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", products())
def test_products_compile_without_spills(name: str, arch: str) -> None:
    check(products()[name], arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_compiles_without_spills(dtype: str, D: int, arch: str) -> None:
    for which in PASSES:
        check(attention("cuda", which, 8, 1024, 12, 12, D, dtype, turned=True), arch)


def check(launch: Launch, arch: str) -> None:
    cubin = nvrtc.compile_cubin(launch.text, arch)
    attributes = nvrtc.attributes(cubin)
    assert attributes[nvrtc.FRAME_BYTES] == 0, "spills"
    assert attributes[nvrtc.REGISTERS] <= 255
    assert nvrtc.shared_bytes(cubin) - RESERVED[arch] == launch.shared_bytes <= 48 << 10


def test_spills_are_seen() -> None:
    launch = product("cuda", "NT", *SIZES, "bfloat16", tile=Tile(blocks=4))  # 128 registers
    cubin = nvrtc.compile_cubin(launch.text, "sm_90")
    assert nvrtc.attributes(cubin)[nvrtc.FRAME_BYTES] > 0


def test_memory_given_by_the_launch_is_not_declared() -> None:
    launch = product(
        "cuda", "NT", *SIZES, "bfloat16", tile=Tile(stages=4), limits=Limits(227 << 10)
    )
    cubin = nvrtc.compile_cubin(launch.text, "sm_90")
    assert nvrtc.shared_bytes(cubin) == RESERVED["sm_90"]
    assert launch.dynamic_bytes == launch.shared_bytes == 4 * (128 + 128) * 32 * 2


def test_an_error_of_the_compiler_is_said() -> None:
    with pytest.raises(AssertionError, match="undefined"):
        nvrtc.compile_cubin('extern "C" __global__ void f() { g(); }', "sm_90")
