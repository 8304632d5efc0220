"""y = x W^T with a frozen W stored in 4 bits, and the gradient of x.

    W[o, i] = q[o, i] scale[o, i // block_size]        q in -8 .. 7, scale float16

Two q share a byte as signed 4-bit numbers, the one with the even i in the low half. The CPU kernel
widens W when it packs a panel of it (`cpu/int4.h`), the GPU's when it loads a tile (`gpu/gemm.c`);
the portable form widens W into a buffer of one layer.
"""

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.ops import forms, sums
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.ops.matmul import NN, NT, gemm, gemm_headers, gemm_macros, gpu_product
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import Call, Gradient, empty


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x (..., in), packed (out, in / 2) uint8, scales (out, in / block) float16 -> (..., out).

    The result is of the type of x. Only x has a gradient.
    """
    form = forms.choose(x, scales, portable=_portable, cpu=_kernel, gpu=_kernel)
    return form(x, packed, scales)


def _portable(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    weight = dequantize(packed, scales).cast(x.dtype).contiguous().detach()
    return (x.contiguous() @ weight.transpose()).contiguous().contiguous_backward()


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """packed (out, in / 2) uint8, scales (out, in / block) float16 -> (out, in) float32, exact."""
    rows, groups = scales.shape
    q = Tensor.stack(packed & 15, packed >> 4, dim=-1) ^ 8  # (out, in / 2, 2), each 8 too large
    values = q.reshape(rows, groups, -1).cast(dtypes.float32) - 8
    return (values * scales.cast(dtypes.float32).unsqueeze(-1)).reshape(rows, -1)


def _kernel(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, packed, scales = call.inputs
        return [_product(NN, dy, packed, scales, x.dtype), None, None]

    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    out = _product(NT, rows, packed, scales, x.dtype, gradient)
    return out.reshape(*x.shape[:-1], packed.shape[0])


def _product(
    layout: int,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    dtype: DType,
    gradient: Gradient | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """a (M, in) W^T (NT), or a (M, out) W (NN), of type `dtype`, plus an `addend` like it."""
    compute = _product_cpu if blocks.dialect_of(a.device) is None else _product_gpu
    result = compute(layout, a, packed, scales, dtype, gradient, addend)
    if gradient is not None or addend is not None:
        return result

    def adding(a: Tensor, packed: Tensor, scales: Tensor, addend: Tensor) -> Tensor:
        return _product(layout, a, packed, scales, dtype, addend=addend)

    return sums.remember(result, [a, packed, scales], adding)


def _product_gpu(
    layout: int,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    dtype: DType,
    gradient: Gradient | None,
    addend: Tensor | None,
) -> Tensor:
    rows, columns = packed.shape[0], 2 * packed.shape[1]  # of W
    form = Packed(4, columns // scales.shape[1])
    n = rows if layout == NT else columns
    try:
        return gpu_product(
            layout, a, [packed, scales], (a.shape[0], n, a.shape[1]), dtype,
            packed=form, gradient=gradient, addend=addend,
        )  # fmt: skip
    except UnsupportedSize:
        if gradient is not None:
            raise
    weight = dequantize(packed, scales).cast(a.dtype).contiguous()
    return gemm(layout, a, weight, dtype=dtype, addend=addend)


def _product_cpu(
    layout: int,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    dtype: DType,
    gradient: Gradient | None,
    addend: Tensor | None,
) -> Tensor:
    rows, columns = packed.shape[0], 2 * packed.shape[1]  # of W
    m, k = a.shape
    n = rows if layout == NT else columns
    defines, sizes = gemm_macros(layout, m, n, k, a.dtype, dtypes.float32, dtype)
    defines["BLOCK"] = columns // scales.shape[1]
    if addend is not None:
        defines["ADDEND"] = 1
    headers = gemm_headers(defines, "int4.h")
    product = Kernel("gemm.c", defines, sizes, headers, flops=2 * m * n * k)
    written = [empty(m, n, dtype=dtype, device=a.device), per_thread(sizes["SCRATCH_FLOATS"])]
    inputs = [a, packed, scales] if addend is None else [a, packed, scales, addend]
    return run(product, written, inputs, gradient)[0]
