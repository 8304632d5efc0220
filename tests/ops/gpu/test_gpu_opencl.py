"""The GPU kernels' texts as OpenCL, executed by the machine's driver, against float64."""

import gpu_kernels
import pytest
from gpu_kernels import ATTENTION, PRODUCTS, TOGETHER
from opencl import needs_opencl, on_opencl, opencl_takes

from tinyllama.ops.gpu.attention import PASSES, attention
from tinyllama.ops.gpu.gemm import Packed, product
from tinyllama.runtime.blocks import TYPE_CODE

pytestmark = needs_opencl


@pytest.mark.parametrize("dtype", TYPE_CODE)
def test_the_texts_compile_without_a_warning(dtype: str) -> None:
    """pocl prints the number of warnings to whoever trains."""
    launches = [
        attention("opencl", which, 1, T, 2, 1, 64, dtype) for which in PASSES for T in (77, 128)
    ]
    launches += [product("opencl", layout, 64, 72, 80, dtype) for layout in ("NT", "NN", "TN")]
    for packed in (Packed(), Packed(8, 32, minimum=True)):
        more = {"packed": packed, "addend": True}
        launches += [
            product("opencl", layout, 37, 64, 64, dtype, **more) for layout in ("NT", "NN")
        ]
    opencl_takes(launches)


def test_every_text_that_is_executed_compiles_without_a_warning() -> None:
    opencl_takes(gpu_kernels.launches("opencl"))


def test_products() -> None:
    found = on_opencl("product", *PRODUCTS)
    assert set(found) == set(PRODUCTS)
    wrong = {n: x for n, x in found.items() if not x <= gpu_kernels.allowed_product_error(n)}
    assert wrong == {}


def test_several_products_of_one_launch() -> None:
    assert on_opencl("together", *TOGETHER) == {name: {} for name in TOGETHER}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    assert on_opencl("attention", name) == {name: {}}
