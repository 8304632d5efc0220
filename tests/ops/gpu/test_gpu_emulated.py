"""The GPU kernels' texts as CUDA and as Metal, executed under emulation, against float64.

Lanes and barriers are those of a GPU, in a random order; asynchronous copies happen at any moment
until they are waited for; writing around an array is an error.
"""

import gpu_kernels
import pytest
from gpu_kernels import ATTENTION, PRODUCTS, TOGETHER, emulate

from tinyllama.ops.gpu.attention import PASSES, attention
from tinyllama.ops.gpu.gemm import Tile, product
from tinyllama.runtime.blocks import FMA, Limits

DIALECTS = ("cuda", "metal")


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_products(dialect: str, name: str) -> None:
    found = gpu_kernels.run_product(emulate, dialect, name)
    assert found <= gpu_kernels.allowed_product_error(name)


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_several_products_of_one_launch(dialect: str, name: str) -> None:
    assert gpu_kernels.wrong_together(emulate, dialect, name) == {}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_attention(dialect: str, name: str) -> None:
    assert gpu_kernels.wrong_attention(emulate, dialect, name) == {}


@pytest.mark.parametrize(
    "more",
    [
        {"tile": Tile(pipelined=True)},
        {"tile": Tile(bn=192, wn=48, bk=64, pipelined=True), "limits": Limits(227 << 10)},
        {"tile": Tile(stages=2, wn=32)},
        {"tile": Tile(bm=96, bn=96, wm=48, wn=48)},
    ],
    ids=["pipelined", "memory given by the launch", "two places, eight groups", "smaller"],
)
def test_other_tilings_of_tensor_cores(more: dict) -> None:
    assert gpu_kernels.run_product(emulate, "cuda", "NT bfloat16", **more) <= 1e-6


@pytest.mark.parametrize("name", ["TN bfloat16, split", "NN float16"])
def test_smaller_blocks_read_without_bank_conflicts(name: str) -> None:
    tile = Tile(bm=96, bn=96, wm=48, wn=48)
    assert gpu_kernels.run_product(emulate, "cuda", name, tile=tile) <= 1e-6
    assert gpu_kernels.cycles_per_bank_read() == 1


@pytest.mark.parametrize("T", [2, 40])
def test_attention_of_few_tokens(T: int) -> None:
    case = {"T": T, "documents": ()}
    assert gpu_kernels.wrong_attention(emulate, "cuda", "float32, D 32, documents", **case) == {}


def test_float32_without_tensor_cores() -> None:
    assert gpu_kernels.run_product(emulate, "cuda", "NT float32", fragment=FMA) <= 1e-6


@pytest.mark.parametrize("name", ["NT bfloat16", "NN float16", "TN bfloat16, split"])
def test_fragments_of_products_are_read_without_bank_conflicts(name: str) -> None:
    gpu_kernels.run_product(emulate, "cuda", name)
    assert gpu_kernels.cycles_per_bank_read() == 1


@pytest.mark.parametrize("D", [32, 48, 80, 128])
def test_fragments_of_attention_are_read_without_bank_conflicts(D: int) -> None:
    gpu_kernels.run_forward_on_zeros(emulate, "cuda", 64, D, "bfloat16")
    assert gpu_kernels.cycles_per_bank_read() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_metals_front_end_takes_the_texts(dtype: str) -> None:
    for layout in ("NT", "NN", "TN"):
        sizes = gpu_kernels.SIZES[layout]
        launch = product("metal", layout, *sizes, dtype, addend=True, accumulate=True)
        gpu_kernels.check_address_spaces(launch)
    for packed in (case["packed"] for case in PRODUCTS.values() if "packed" in case):
        launch = product("metal", "NT", 37, 150, 192, dtype, packed=packed)
        gpu_kernels.check_address_spaces(launch)
    for which in PASSES:
        gpu_kernels.check_address_spaces(attention("metal", which, 1, 77, 2, 1, 64, dtype))


def test_metals_front_end_takes_every_text_that_is_executed() -> None:
    texts = {launch.text: launch for launch in gpu_kernels.launches("metal")}
    macros = "TERMS 3", "BATCH 3", "GATED 1", "UNGATED 1", "TURNED 2", "GROUP 64", "PASS FORWARD"
    assert all(any(f"#define {macro}\n" in text for text in texts) for macro in macros)
    for launch in texts.values():
        gpu_kernels.check_address_spaces(launch)


def test_metals_front_end_finds_a_pointer_into_the_wrong_memory() -> None:
    launch = product("metal", "NT", 64, 64, 64, "float32")
    wrong = launch.text.replace("LOCAL const Element *tb = ta", "GLOBAL const Element *tb = ta")
    assert wrong != launch.text
    with pytest.raises(AssertionError, match="address space"):
        gpu_kernels.check_address_spaces(gpu_kernels.replaced(launch, lambda text: wrong))
