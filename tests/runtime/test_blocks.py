"""How GPU launches are cut up, and what is refused; the kernels themselves run in tests/ops/gpu."""

import re

import pytest

from tinyllama.ops.gpu import gemm
from tinyllama.ops.gpu.attention import PASSES, Cut, attention
from tinyllama.ops.gpu.gemm import Packed, Tile, Turned, best_cut, best_split, product
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import LIMITS, Limits, UnsupportedSize


def macro(text: str, name: str) -> str | None:
    found = re.search(rf"^#define {name} (.*)$", text, re.MULTILINE)
    return found[1] if found else None


def test_a_product_is_cut_into_blocks_that_cover_it() -> None:
    launch = product("cuda", "NT", 300, 520, 64, "bfloat16")
    assert (launch.grid, launch.threads) == ((3 * 5, 1, 1), 128)
    assert launch.shared_bytes == 3 * (128 + 128) * 32 * 2 == 48 << 10
    assert launch.flops == 2 * 300 * 520 * 64
    assert launch.arguments == ("c", "a", "b")
    assert [macro(launch.text, name) for name in ("M", "N", "K")] == ["300", "520", "64"]
    small = product("metal", "NT", 300, 520, 64, "float32")
    assert (small.grid, small.threads) == ((5 * 9, 1, 1), 128)
    assert small.shared_bytes == 2 * (64 + 64) * 32 * 4 == 32 << 10


def test_a_split_product_has_parts_in_float32() -> None:
    launch = product("cuda", "TN", 256, 256, 4096, "bfloat16", split=3)
    assert launch.grid == (4, 1, 3)
    assert macro(launch.text, "OUT_TYPE") == "0" and macro(launch.text, "TYPE") == "1"


def test_arguments_follow_the_options() -> None:
    launch = product("cuda", "NT", 8, 8, 64, "bfloat16", addend=True, packed=Packed(4, 32, True))
    assert launch.arguments == ("c", "a", "b", "scales", "minima", "addend")
    assert product("cuda", "NT", 8, 8, 64, "float16", packed=Packed()).arguments == (
        "c", "a", "b", "scales",
    )  # fmt: skip


def test_attention_is_cut_into_blocks_that_cover_it() -> None:
    forward = attention("cuda", "forward", 2, 130, 6, 2, 64, "bfloat16")
    assert (forward.grid, forward.threads) == ((3, 1, 2 * 6), 128)
    assert forward.shared_bytes == (64 + 4 * 64) * 64 * 2
    assert forward.arguments == ("out", "lse", "q", "k", "v", "starts")
    assert forward.flops == 2 * 2 * 6 * 130 * 130 * 64
    keys = attention("cuda", "gradient_kv", 2, 130, 6, 2, 64, "bfloat16")
    assert keys.grid == (3, 1, 2 * 2)


@pytest.mark.parametrize("dialect", LIMITS)
@pytest.mark.parametrize("dtype", blocks.TYPE_CODE)
def test_every_head_size_fits_every_device(dialect: blocks.Dialect, dtype: blocks.DType) -> None:
    for D in range(32, 129, 16):
        for which in PASSES:
            if (dialect, dtype, D) == ("opencl", "float32", 128) and which != "forward":
                continue  # see the test below
            launch = attention(dialect, which, 1, 100, 2, 1, D, dtype)
            assert launch.shared_bytes <= LIMITS[dialect].shared_bytes
            assert launch.threads <= 128 and launch.dynamic_bytes == 0


def test_larger_tiles_are_taken_where_there_is_memory() -> None:
    def rows(limits: Limits) -> str | None:
        launch = attention("opencl", "gradient_q", 1, 9, 1, 1, 128, "float32", limits=limits)
        return macro(launch.text, "OWN_ROWS")

    assert rows(Limits(64 << 10)) == "32"
    assert rows(Limits(33 << 10)) == "16"
    with pytest.raises(UnsupportedSize) as error:
        rows(Limits(32 << 10))
    assert str(error.value) == (
        "attention with head_dim 128 in float32 needs 33792 bytes of shared memory per block; "
        "opencl allows 32768"
    )


@pytest.mark.parametrize(
    ("layout", "sizes", "dtype", "words"),
    [
        ("NT", (8, 8, 60), "bfloat16", "multiples of 8 elements and N even; K 60 is not"),
        ("NN", (8, 12, 64), "float16", "multiples of 8 elements and N even; N 12 is not"),
        ("TN", (6, 8, 64), "float32", "multiples of 4 elements and N even; M 6 is not"),
        ("NT", (8, 9, 64), "float32", "multiples of 4 elements and N even; N 9 is not"),
    ],
)
def test_a_product_whose_rows_are_not_aligned_is_refused(
    layout: gemm.Layout, sizes: tuple[int, int, int], dtype: blocks.DType, words: str
) -> None:
    with pytest.raises(UnsupportedSize, match=re.escape(words)):
        product("cuda", layout, *sizes, dtype)


def test_what_rows_of_16_bytes_leave_free_may_be_odd() -> None:
    product("cuda", "NT", 7, 10, 64, "bfloat16")
    product("cuda", "TN", 8, 8, 7, "bfloat16")


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    words = "groups of 64 do not divide rows of 96 packed numbers"
    with pytest.raises(UnsupportedSize, match=words):
        product("cuda", "NT", 8, 8, 96, "bfloat16", packed=Packed())
    product("cuda", "NN", 8, 64, 96, "bfloat16", packed=Packed())


@pytest.mark.parametrize(("D", "H", "KV"), [(16, 2, 1), (72, 2, 1), (144, 2, 1), (64, 3, 2)])
def test_heads_that_no_kernel_takes_are_refused(D: int, H: int, KV: int) -> None:
    with pytest.raises(UnsupportedSize, match=r"head_dim: got \d+|num_kv_heads: got 2"):
        attention("cuda", "forward", 1, 64, H, KV, D, "bfloat16")


def test_several_products_that_no_kernel_takes_are_refused() -> None:
    with pytest.raises(UnsupportedSize, match="two matrices in groups of 16 columns"):
        narrow = Tile(bm=64, bn=32, wm=32, wn=16, stages=2)
        product("metal", "NT", 64, 24, 64, "float32", gated=True, tile=narrow)
    for head in (24, 128):
        with pytest.raises(UnsupportedSize, match=f"heads of {head} in groups of 64 columns"):
            product("cuda", "NT", 64, 384, 64, "bfloat16", turned=Turned(head, 64))


def test_limits_of_a_device_are_held() -> None:
    sizes = (256, 256, 256)
    with pytest.raises(UnsupportedSize, match="gemm: 65536 bytes of shared memory per block; cuda"):
        product("cuda", "NT", *sizes, "bfloat16", tile=Tile(stages=4))
    with pytest.raises(UnsupportedSize, match="gemm: 128 threads per block; metal allows 64"):
        product("metal", "NT", *sizes, "float32", limits=Limits(32 << 10, threads=64))
    with pytest.raises(UnsupportedSize, match="gemm: 3 buffers; metal allows 2"):
        product("metal", "NT", *sizes, "float32", limits=Limits(32 << 10, buffers=2))
    large = Cut(128, 64, 2)
    with pytest.raises(UnsupportedSize, match="attention: 49152 bytes"):
        attention("metal", "forward", 1, 64, 1, 1, 64, "bfloat16", cut=large)


def test_memory_beyond_what_a_text_may_declare_is_given_by_the_launch() -> None:
    tile = Tile(stages=4)
    launch = product("cuda", "NT", 256, 256, 256, "bfloat16", tile=tile, limits=Limits(227 << 10))
    assert launch.dynamic_bytes == launch.shared_bytes == 64 << 10
    assert macro(launch.text, "DYNAMIC") == "1"


def test_products_of_few_blocks_are_split_until_no_multiprocessor_idles() -> None:
    assert best_split(768, 768, 8192, Tile(), 132, 350e12) == 3
    # 36 blocks on 132 multiprocessors: 3 parts occupy 108, 7 parts 252 of 264 but write more sums.
    assert best_split(768, 768, 1 << 20, Tile(), 132, 350e12) == 7  # 11 parts save 5 %
    assert best_split(3072, 768, 8192, Tile(), 132, 350e12) == 2  # 4 parts save 8 %
    assert best_split(8192, 3072, 768, Tile(), 132, 350e12) == 1  # 1536 blocks
    assert best_split(64, 64, 32, Tile(), 132, 350e12) == 1  # a single tile along K


def test_smaller_blocks_are_taken_where_they_leave_no_multiprocessor_idle() -> None:
    def cut(M: int, N: int, K: int, dtype: blocks.DType = "bfloat16") -> tuple[int, int, int]:
        tile, split = best_cut("cuda", M, N, K, dtype, 132)
        return tile.bm, tile.bn, split

    # 144 blocks of 128 x 128 need four parts of a sum; 256 of 96 x 96 are two rounds of 132.
    assert cut(3072, 768, 8192) == (96, 96, 1)
    assert cut(768, 768, 8192) == (96, 96, 2)  # 128 of 132
    assert cut(8192, 3072, 768) == (128, 128, 1)  # 1536 blocks, 97 % of 12 rounds
    tile, _ = best_cut("metal", 3072, 768, 8192, "bfloat16", 16)
    assert (tile.bm, tile.bn) == (64, 64)
    tile, _ = best_cut("cuda", 8192, 16, 768, "bfloat16", 132)
    assert (tile.bm, tile.bn) == (128, 32)


def test_metals_library_is_included_before_names_of_sizes() -> None:
    text = attention("metal", "forward", 1, 64, 1, 1, 64, "float32").text
    assert text.startswith("#include <metal_stdlib>\n")
