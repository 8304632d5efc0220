"""The product with a packed weight: both forms against numpy, and against the dense product."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.ops import forms
from tinyllama.ops.int4 import dequantize, int4_linear
from tinyllama.ops.matmul import linear
from tinyllama.runtime.storage import read

FORMS = ["cpu", "portable"]
TYPES = [dtypes.float32, dtypes.bfloat16, dtypes.float16]
# Relative rounding of a stored result; the portable form also rounds the weight to it.
ROUNDING = {dtypes.float32: 1e-6, dtypes.bfloat16: 2**-7, dtypes.float16: 2**-10}
BATCH, LENGTH, OUTPUTS, INPUTS, BLOCK = 2, 17, 37, 96, 32


def weight_of(kind, outputs=OUTPUTS, inputs=INPUTS, block=BLOCK, seed=0):
    """Random packed numbers of a kind and the weight in float64: ([packed, ...], weight)."""
    if kind == "4 bits":
        *packed, weight = packed_weight(outputs, inputs, block, seed)
        return packed, weight
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.uniform(-12, 0, (outputs, inputs // block))).astype(np.float16)
    spread = np.repeat(scales.astype(np.float64), block, axis=1)
    if kind == "8 bits":
        q = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        return [q, scales], q * spread
    q = rng.integers(0, 16, (outputs, inputs))
    minima = -(8 * scales).astype(np.float16)
    weight = (q * spread + np.repeat(minima.astype(np.float64), block, axis=1)).astype(np.float32)
    packed = (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8)
    return [packed, scales, minima], weight.astype(np.float64)


KINDS = ["4 bits", "4 bits with minima", "8 bits"]


def packed_weight(outputs=OUTPUTS, inputs=INPUTS, block=BLOCK, seed=0):
    """Every q from -8 to 7 and scales of all sizes: (packed, scales, the weight in float64)."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-8, 8, (outputs, inputs))
    scales = np.exp(rng.uniform(-12, 0, (outputs, inputs // block))).astype(np.float16)
    low, high = q[:, 0::2] & 15, q[:, 1::2] & 15
    weight = q * np.repeat(scales.astype(np.float64), block, axis=1)
    return (low | high << 4).astype(np.uint8), scales, weight


def tensors(*arrays):
    return [Tensor(array).realize() for array in arrays]


def input_like(shape, dtype, seed):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Tensor(values).cast(dtype).realize()


def product_and_gradient(dtype, form, kind):
    """y, dx and what numpy gets for them from the very inputs."""
    packed, weight = weight_of(kind)
    with forms.forced(form):
        x = input_like((BATCH, LENGTH, INPUTS), dtype, 1)
        dy = input_like((BATCH, LENGTH, OUTPUTS), dtype, 2)
        y = int4_linear(x, *tensors(*packed))
        (dx,) = y.gradient(x, gradient=dy)
        assert y.dtype == dx.dtype == dtype
        found = y.float().numpy(), dx.float().numpy()
        given = [t.float().numpy().astype(np.float64) for t in (x, dy)]
    return *found, given[0] @ weight.T, given[1] @ weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_of_the_input_are_those_of_the_weight_it_stands_for(kind, dtype, form):
    y, dx, expected_y, expected_dx = product_and_gradient(dtype, form, kind)
    assert np.abs(y - expected_y).max() < ROUNDING[dtype] * np.abs(expected_y).max()
    assert np.abs(dx - expected_dx).max() < ROUNDING[dtype] * np.abs(expected_dx).max()


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("rows", "inputs", "block"), [(1, 192, 64), (8, 96, 32), (3, 132, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_multiplied_without_packing(kind, rows, inputs, block, dtype):
    """As in generation; groups of whole vectors, and of 6, in a row that ends in half a vector."""
    packed, weight = weight_of(kind, inputs=inputs, block=block)
    with forms.forced("cpu"):
        x = input_like((rows, inputs), dtype, 1)
        y = int4_linear(x, *tensors(*packed)).float().numpy()
    expected = x.float().numpy().astype(np.float64) @ weight.T
    assert np.abs(y - expected).max() < ROUNDING[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 9])
def test_rows_of_any_width_have_room_in_scratch(rows):
    """8 rows of more than 140,000 numbers are larger than a block of panels."""
    inputs = 160_000
    packed, scales, weight = packed_weight(3, inputs, 32)
    x = input_like((rows, inputs), dtypes.float32, 3)
    found = int4_linear(x, *tensors(packed, scales)).numpy()
    expected = x.numpy().astype(np.float64) @ weight.T
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_slope_of_the_product(form):
    """Finite differences of sum(y * dy) along random directions; it is linear in x."""
    packed, scales, _ = packed_weight()
    with forms.forced(form):
        weight = tensors(packed, scales)
        x, direction = (input_like((3, INPUTS), dtypes.float32, seed) for seed in (3, 4))
        dy = input_like((3, OUTPUTS), dtypes.float32, 5)
        (dx,) = int4_linear(x, *weight).gradient(x, gradient=dy)
        ahead = (int4_linear((x + direction).contiguous(), *weight) * dy).sum().item()
        behind = (int4_linear((x - direction).contiguous(), *weight) * dy).sum().item()
        assert (dx * direction).sum().item() == pytest.approx((ahead - behind) / 2, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weight_is_exact(kind, form):
    packed, weight = weight_of(kind)
    with forms.forced(form):
        assert (dequantize(*tensors(*packed)).numpy() == weight).all()


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_gives_the_bits_of_the_dense_product(kind):
    """Widening where a panel is packed changes nothing: same panels, same order of the sums."""
    packed, weight = weight_of(kind)
    with forms.forced("cpu"):
        x = input_like((LENGTH, INPUTS), dtypes.float32, 6)
        dense = linear(x, Tensor(weight.astype(np.float32)).realize()).numpy()
        assert (int4_linear(x, *tensors(*packed)).numpy() == dense).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_weight_gets_no_gradient(form):
    packed, scales = tensors(*packed_weight()[:2])
    with forms.forced(form):
        y = int4_linear(input_like((LENGTH, INPUTS), dtypes.float32, 7), packed, scales)
        assert (y.sum().gradient(scales)[0].numpy() == 0).all()


def test_a_thread_holds_no_more_of_the_wide_weight_than_a_block_of_panels():
    packed, scales, weight = packed_weight(2048, 2048, 64)
    with forms.forced("cpu"):
        x = input_like((LENGTH, 2048), dtypes.float32, 8)
        y = int4_linear(x, *tensors(packed, scales))
        written = [u for u in y.uop.toposort() if u.op is Ops.CONTIGUOUS]
    widths = {u.shape[-1] for u in written} - {2048}  # besides x and y
    assert len(widths) == 1 and max(widths) < weight.size / 3


def test_a_tensor_reads_back_as_it_was_packed():
    packed, scales = tensors(*packed_weight()[:2])
    assert (read(packed) == packed_weight()[0]).all()
    assert (read(scales) == packed_weight()[1]).all()
