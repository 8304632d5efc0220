"""y = x W^T with a frozen W stored in 4 or 8 bits, and the gradient of x.

    W[o, i] = q[o, i] scale[o, i // block_size]                            q signed
    W[o, i] = q[o, i] scale[o, i // block_size] + minimum[o, i // block_size]    q unsigned

q of 8 bits are int8. Of 4 bits, two share a byte of uint8, the one with the even i in the low half.
Scales and minima are float16. The CPU kernel widens W when it packs a panel of it (`cpu/int4.h`),
the GPU's when it loads a tile (`gpu/gemm.c`); the portable form widens W into a buffer of one
layer.
"""

from collections.abc import Sequence
from typing import Literal

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.ops import forms, sums
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.ops.matmul import NN, NT, gemm, gemm_headers, gemm_macros, gpu_product
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, Gradient, empty


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out) of the type of x. Only x has a gradient.

    packed (out, in / 2) uint8 or (out, in) int8; scales and minima (out, in / block) float16.
    """
    form = forms.choose(x, scales, portable=_portable, cpu=_kernel, gpu=_kernel)
    return form(x, packed, scales, minima)


def _portable(x: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
    weight = dequantize(packed, scales, minima).cast(x.dtype).contiguous().detach()
    return (x.contiguous() @ weight.transpose()).contiguous().contiguous_backward()


def dequantize(packed: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """The weight (out, in) float32 that packed numbers stand for, as `int4_linear` has them."""
    rows, groups = scales.shape
    q = packed
    if packed.dtype == dtypes.uint8:
        q = Tensor.stack(packed & 15, packed >> 4, dim=-1)  # (out, in / 2, 2)
    values = q.reshape(rows, groups, -1).cast(dtypes.float32)
    if packed.dtype == dtypes.uint8 and minima is None:
        values = (q ^ 8).reshape(rows, groups, -1).cast(dtypes.float32) - 8
    values = values * scales.cast(dtypes.float32).unsqueeze(-1)
    if minima is not None:
        values = values + minima.cast(dtypes.float32).unsqueeze(-1)
    return values.reshape(rows, -1)


def int4_embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None, dtype: DType
) -> Tensor:
    """Rows ids (B, T) of a packed table (V, H), as `int4_linear` has it -> (B, T, H) of `dtype`."""
    form = forms.choose(scales, portable=_portable_rows, cpu=_cpu_rows)
    return form(ids.cast(dtypes.int32), packed, scales, minima, dtype)


def _portable_rows(
    ids: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None, dtype: DType
) -> Tensor:
    flat = ids.reshape(-1)
    q, s = (part[flat].contiguous() for part in (packed, scales))
    values = dequantize(q, s, None if minima is None else minima[flat].contiguous())
    return values.cast(dtype).reshape(*ids.shape, -1).contiguous()


def _cpu_rows(
    ids: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None, dtype: DType
) -> Tensor:
    weight = [packed, scales] if minima is None else [packed, scales, minima]
    _, rows, width = _sizes(packed)
    defines = {"LAYOUT": 0, "ROWS_ONLY": 1, "ACT": TYPE_CODE[dtype], **_form(weight)}
    sizes = {"COUNT": ids.numel(), "N": rows, "K": width}
    lookup = Kernel("embedding_packed.c", defines, sizes, ("int4.h",))
    return run(lookup, [empty(*ids.shape, width, dtype=dtype, device="CPU")], [*weight, ids])[0]


def _form(weight: Sequence[Tensor]) -> dict[str, int]:
    """The macros of cpu/int4.h."""
    bits, _, columns = _sizes(weight[0])
    return {"BLOCK": columns // weight[1].shape[1], "BITS": bits, "MINIMA": len(weight) - 2}


def _kernel(x: Tensor, packed: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, *weight = call.inputs
        return [_product(NN, dy, weight, x.dtype), *[None for _ in weight]]

    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    weight = [packed, scales] if minima is None else [packed, scales, minima]
    out = _product(NT, rows, weight, x.dtype, gradient)
    return out.reshape(*x.shape[:-1], packed.shape[0])


def _product(
    layout: int,
    a: Tensor,
    weight: Sequence[Tensor],
    dtype: DType,
    gradient: Gradient | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """a (M, in) W^T (NT), or a (M, out) W (NN), of type `dtype`, plus an `addend` like it.

    weight: packed, scales and, where there are some, minima.
    """
    compute = _product_cpu if blocks.dialect_of(a.device) is None else _product_gpu
    result = compute(layout, a, weight, dtype, gradient, addend)
    if (gradient is not None and compute is _product_cpu) or addend is not None:
        return result

    def adding(a: Tensor, *others: Tensor) -> list[Tensor]:
        *weight, addend = others
        return [_product(layout, a, weight, dtype, addend=addend)]

    return sums.remember(result, [a, *weight], adding)


def _sizes(packed: Tensor) -> tuple[Literal[4, 8], int, int]:
    """Bits, and the rows and columns of W."""
    bits: Literal[4, 8] = 4 if packed.dtype == dtypes.uint8 else 8
    return bits, packed.shape[0], packed.shape[1] * 8 // bits


def _product_gpu(
    layout: int,
    a: Tensor,
    weight: Sequence[Tensor],
    dtype: DType,
    gradient: Gradient | None,
    addend: Tensor | None,
) -> Tensor:
    bits, rows, columns = _sizes(weight[0])
    form = Packed(bits, columns // weight[1].shape[1], minimum=len(weight) > 2)
    n = rows if layout == NT else columns
    try:
        return gpu_product(
            layout, a, [*weight], (a.shape[0], n, a.shape[1]), dtype,
            packed=form, gradient=gradient, addend=addend,
        )  # fmt: skip
    except UnsupportedSize:
        if gradient is not None:
            raise
    widened = dequantize(*weight).cast(a.dtype).contiguous()
    return gemm(layout, a, widened, dtype=dtype, addend=addend)


def _product_cpu(
    layout: int,
    a: Tensor,
    weight: Sequence[Tensor],
    dtype: DType,
    gradient: Gradient | None,
    addend: Tensor | None,
) -> Tensor:
    _, rows, columns = _sizes(weight[0])
    m, k = a.shape
    n = rows if layout == NT else columns
    defines, sizes = gemm_macros(layout, m, n, k, a.dtype, dtypes.float32, dtype)
    defines |= _form(weight)
    if layout == NT:
        sizes["SCRATCH_FLOATS"] = max(sizes["SCRATCH_FLOATS"], _dot_floats(k, defines["BLOCK"]))
    if addend is not None:
        defines["ADDEND"] = 1
    headers = gemm_headers(defines, "int4.h")
    product = Kernel("gemm.c", defines, sizes, headers, flops=2 * m * n * k)
    written = [empty(m, n, dtype=dtype, device=a.device), per_thread(sizes["SCRATCH_FLOATS"])]
    inputs = [a, *weight] if addend is None else [a, *weight, addend]
    return run(product, written, inputs, gradient)[0]


def _dot_floats(k: int, block: int) -> int:
    """Floats that a thread needs for few rows, on any instruction set (see cpu/int4.h)."""
    return -(-(8 * k + 9 * (k // block + 15)) // 1024) * 1024
