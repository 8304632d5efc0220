"""Sums of products are taken by the products: same values, fewer passes."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.engine.realize import run_linear
from tinygrad.uop.ops import Ops

from tinyllama.ops import forms
from tinyllama.ops.int4 import int4_linear
from tinyllama.ops.matmul import NN, gemm, linear
from tinyllama.ops.sums import into_products


def random(*shape, seed=0, dtype=dtypes.float32):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Tensor(values).cast(dtype).realize()


def operations(tensors):
    """Sums, and calls of kernels, in the graph of these tensors."""
    order = Tensor.stack(*(t.flatten().sum() for t in tensors)).uop.toposort()
    sums = [u for u in order if u.op is Ops.ADD and u.shape and u.dtype.scalar() in dtypes.floats]
    return len(sums), sum(u.op is Ops.CALL for u in order)


@pytest.fixture(autouse=True)
def kernels():
    with forms.forced("cpu"):
        yield


def products(count, dtype=dtypes.float32):
    parts = [(random(7, 9, seed=i, dtype=dtype), random(9, 21, seed=50 + i)) for i in range(count)]
    expected = sum(a.float().numpy().astype(np.float64) @ b.numpy() for a, b in parts)
    return [gemm(NN, a, b, dtype=dtype).reshape(1, 7, 21) for a, b in parts], expected


@pytest.mark.parametrize(("dtype", "rounding"), [(dtypes.float32, 1e-6), (dtypes.float16, 2e-3)])
def test_a_chain_of_products_has_no_sum_of_its_own(dtype, rounding):
    (a, b, c), expected = products(3, dtype)
    (total,) = into_products([a + b + c])
    assert operations([total]) == (0, 3)
    found = total.float().numpy().reshape(7, 21)
    assert np.abs(found - expected).max() < rounding * np.abs(expected).max()


def test_a_product_takes_what_is_no_product():
    (a,), expected = products(1)
    more = random(1, 7, 21, seed=99)
    (total,) = into_products([more * 2 + a])
    assert operations([total])[0] == 0
    assert np.abs(total.numpy()[0] - expected - 2 * more.numpy()[0]).max() < 1e-5


def test_a_product_that_something_else_reads_is_left_alone():
    (a, b), expected = products(2)
    first, total = into_products([a, a + (b + 1).contiguous()])
    assert operations([first, total]) == (2, 2)  # + 1, and the sum
    assert np.abs(total.numpy()[0] - expected - 1).max() < 1e-5
    (twice,) = into_products([a + a])
    assert operations([twice])[0] == 1
    assert np.abs(twice.numpy() - 2 * a.numpy()).max() == 0


def test_what_reads_the_sum_in_memory_reads_the_product():
    (a, b), expected = products(2)
    weight = random(5, 21, seed=3)
    (out,) = into_products([gemm(0, (a + b).reshape(7, 21), weight)])
    assert operations([out]) == (0, 3)
    assert sum(u.op is Ops.CONTIGUOUS and u.src[0].op is Ops.AFTER for u in out.uop.toposort()) == 0
    assert np.abs(out.numpy() - expected @ weight.numpy().T.astype(np.float64)).max() < 1e-4


def test_gradients_of_a_packed_and_a_plain_layer_are_summed_by_the_products():
    rng = np.random.default_rng(0)
    packed = Tensor(rng.integers(0, 256, (21, 16), dtype=np.uint8)).realize()
    scales = Tensor(rng.random((21, 1)).astype(np.float16)).realize()
    x, weight, dy = random(6, 32), random(21, 32, seed=2), random(6, 21, seed=3)
    out = int4_linear(x, packed, scales) + linear(x, weight)
    (plain,) = out.gradient(x, gradient=dy)
    (summed,) = into_products([plain])
    assert operations([plain])[0] == 1 and operations([summed])[0] == 0
    assert np.abs(summed.numpy() - plain.numpy()).max() < 1e-5 * np.abs(plain.numpy()).max()


def test_an_addend_gets_the_gradient_of_the_result():
    x, weight, addend = random(4, 9), random(5, 9, seed=1), random(4, 5, seed=2)
    dy = random(4, 5, seed=3)
    found = linear(x, weight, addend)
    dx, dw, da = found.gradient(x, weight, addend, gradient=dy)
    assert np.abs(found.numpy() - (linear(x, weight) + addend).numpy()).max() < 1e-6
    expected = linear(x, weight).gradient(x, weight, gradient=dy)
    assert (da.numpy() == dy.numpy()).all()
    assert (dx.numpy() == expected[0].numpy()).all() and (dw.numpy() == expected[1].numpy()).all()


@pytest.mark.parametrize("widths", [(24, 24, 24), (24, 12, 12), (24, 16, 8)])
@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float16])
def test_in_portable_form_each_product_of_a_sum_has_a_kernel_of_its_own(widths, dtype):
    """As tensor cores need it; left to itself tinygrad computes all in one."""
    with forms.forced("portable"):
        x = random(2, 5, 10, dtype=dtype)
        weights = [random(width, 10, seed=width + i) for i, width in enumerate(widths)]
        dy = [random(2, 5, width, seed=70 + i, dtype=dtype) for i, width in enumerate(widths)]
        outputs = [linear(x, weight) for weight in weights]
        total = sum(((y * d.float()).sum() for y, d in zip(outputs, dy, strict=True)), start=0)
        dx = into_products(total.gradient(x))[0].contiguous()
        kernels, _ = Tensor.linear_with_vars(dx)
        run_linear(kernels)
    found = [products_in(call.src[0]) for call in kernels.src]
    assert max(found) == 1 and sum(found) == 3
    pairs = zip(dy, weights, strict=True)
    expected = sum(d.float().numpy() @ w.cast(dtype).float().numpy() for d, w in pairs)
    rounding = 1e-5 if dtype == dtypes.float32 else 5e-3
    assert np.abs(dx.float().numpy() - expected).max() < rounding * np.abs(expected).max()


def products_in(ast):
    return sum(u.op is Ops.REDUCE and u.arg[0] is Ops.ADD for u in ast.toposort())
