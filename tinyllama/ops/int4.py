"""y = x W^T with a frozen W held in 4 bits, and the gradient of x.

    W[o, i] = q[o, i] scale[o, i // block_size]        q in -8 .. 7, scale float16

Two q share a byte as signed 4 bit numbers, the one with the even i in the low half. On the CPU the
product widens W where it packs a panel of it (`cpu/int4.h`); elsewhere W is widened into a buffer
of one layer.
"""

from collections.abc import Callable

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import UOp

from tinyllama.ops import sums
from tinyllama.ops.matmul import (
    NN,
    NT,
    gemm_headers,
    gemm_macros,
)
from tinyllama.runtime import kernel


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x (..., in), packed (out, in / 2) uint8, scales (out, in / block) float16 -> (..., out).

    The result is of the type of x. Only x has a gradient.
    """
    if kernel.uses_kernels(x, scales):
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        return _forward(rows, packed, scales).reshape(*x.shape[:-1], packed.shape[0])
    weight = dequantize(packed, scales).cast(x.dtype).contiguous().detach()
    return (x.contiguous() @ weight.transpose()).contiguous().contiguous_backward()


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """packed (out, in / 2) uint8, scales (out, in / block) float16 -> (out, in) float32, exact."""
    rows, groups = scales.shape
    q = Tensor.stack(packed & 15, packed >> 4, dim=-1) ^ 8  # (out, in / 2, 2), each 8 too large
    values = q.reshape(rows, groups, -1).cast(dtypes.float32) - 8
    return (values * scales.cast(dtypes.float32).unsqueeze(-1)).reshape(rows, -1)


def _forward(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        dx = _product(NN, Tensor(grad), Tensor(call.src[-2]), Tensor(call.src[-1]), rows.dtype)
        return None, None, dx.uop, None, None

    return _product(NT, rows, packed, scales, rows.dtype, gradient)


def _product(
    layout: int,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    dtype: DType,
    gradient: Callable[..., tuple[UOp | None, ...]] | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """a (M, in) W^T (NT), or a (M, out) W (NN), of type `dtype`, plus an `addend` like it."""
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    m, k = a.shape
    n = outputs if layout == NT else inputs
    defines, sizes = gemm_macros(layout, m, n, k, a.dtype, dtypes.float32, dtype)
    defines["BLOCK"] = inputs // scales.shape[1]
    if addend is not None:
        defines["ADDEND"] = 1
    result = kernel.run(
        "gemm.c",
        defines,
        [kernel.empty(m, n, dtype=dtype), kernel.threaded(sizes["SCRATCH_FLOATS"])],
        [a, packed, scales] if addend is None else [a, packed, scales, addend],
        sizes=sizes,
        flops=2 * m * n * k,
        headers=gemm_headers(defines, "int4.h"),
        gradient=gradient,
    )[0]
    if gradient is not None or addend is not None:
        return result

    def adding(a: Tensor, packed: Tensor, scales: Tensor, addend: Tensor) -> Tensor:
        return _product(layout, a, packed, scales, dtype, addend=addend)

    return sums.remember(result, [a, packed, scales], adding)
