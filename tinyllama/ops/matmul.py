"""y = x W^T, the matrix product of every linear layer, with its two gradients.

Backward: dx = dy W and dW = dy^T x. All three are one blocked kernel, `cpu/gemm.c` on the CPU and
`gpu/gemm.c` on a GPU. The portable form is tinygrad's own product; its inputs are put into memory
first, or the scheduler would compute them again for each element of the result.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tinygrad import Device, Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.ops import copies, forms, products, sums
from tinyllama.ops.gpu import few_rows
from tinyllama.ops.gpu.gemm import (
    LAYOUTS,
    MOST_TOGETHER,
    Packed,
    best_cut,
    default_tile,
    product,
)
from tinyllama.runtime import blocks, c_kernel
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, Gradient, empty
from tinyllama.system import device

NT, NN, TN = products.NT, products.NN, products.TN
# Up to this many rows of A, each number of rows is compiled separately (SKINNY of cpu/gemm.c).
FEW_ROWS = 8
# How float32 matrices are multiplied, the current choice last (see `float32_products`).
_float32_products = ["exact"]


@contextlib.contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Multiply float32 matrices "exact", or where AMX does as "bfloat16x3" (cpu/bf16x3.h)."""
    _float32_products.append(kind)
    try:
        yield
    finally:
        _float32_products.pop()


def offers_bfloat16x3() -> bool:
    """Whether "bfloat16x3" is faster than float32 products: in AMX alone."""
    return Device.DEFAULT == "CPU" and device.kernels_enabled() and c_kernel.has_amx()


def linear(x: Tensor, weight: Tensor, addend: Tensor | None = None) -> Tensor:
    """x (..., in) in the activation type, weight (out, in) float32 -> (..., out) like x.

    An `addend`, like the result, is added to it.
    """
    form = forms.choose(x, weight, portable=_portable, cpu=_kernel, gpu=_kernel)
    return form(x, weight, addend)


def _portable(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    x = x.contiguous()
    out = (x @ weight.cast(x.dtype).transpose()).contiguous().contiguous_backward()
    return out if addend is None else out + addend


def _kernel(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    weight_type = weight.dtype

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, weight, *addends = call.inputs  # on a GPU the weight may have been cast
        dx = gemm(NN, dy, weight, dtype=x.dtype)
        dw = gemm(TN, dy, x, dtype=weight_type)
        return [dx, dw, *[dy for _ in addends]]

    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    if addend is not None:
        addend = addend.reshape(-1, weight.shape[0])
    out = gemm(NT, rows, weight, dtype=x.dtype, gradient=gradient, addend=addend)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def gemm(
    layout: int,
    a: Tensor,
    b: Tensor,
    *,
    dtype: DType = dtypes.float32,
    gradient: Gradient | None = None,
    onto: Tensor | None = None,
    over: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """One product by a kernel: a and b in the shapes of `layout`, result (M, N) of type `dtype`.

    With `onto`, a float32 (M, N), the product is added to that in place; with `over`, an (M, N) of
    type `dtype`, it is written there. An `addend`, (M, N) of type `dtype`, is added to the result.

    On a GPU, b is cast to the type of a. Sizes that its kernel does not take are computed in
    portable form, to a new tensor; with `gradient` they raise UnsupportedSize.
    """
    compute = _gemm_cpu if blocks.dialect_of(a.device) is None else _gemm_gpu
    result = compute(layout, a, b, dtype, gradient, onto, over, addend)
    # On the CPU a product that has a gradient adds nothing: results there stay as they are.
    final = gradient is not None and compute is _gemm_cpu
    if final or onto is not None or over is not None or addend is not None:
        return result

    def adding(a: Tensor, b: Tensor, addend: Tensor) -> list[Tensor]:
        return [gemm(layout, a, b, dtype=dtype, addend=addend)]

    return sums.remember(result, [a, b], adding)


def _sizes(layout: int, a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """M, N and K of a product."""
    m, k = a.shape[::-1] if layout == TN else a.shape
    return m, b.shape[0] if layout == NT else b.shape[1], k


def _gemm_gpu(
    layout: int,
    a: Tensor,
    b: Tensor,
    dtype: DType,
    gradient: Gradient | None,
    onto: Tensor | None,
    over: Tensor | None,
    addend: Tensor | None,
) -> Tensor:
    given = over if onto is None else onto
    accumulate = onto is not None
    try:
        return gpu_product(
            layout, a, [b], _sizes(layout, a, b), dtype, gradient=gradient, given=given,
            accumulate=accumulate, addend=addend,
        )  # fmt: skip
    except UnsupportedSize:
        if gradient is not None:
            raise
    a, b = a.contiguous(), b.cast(a.dtype).contiguous()
    left, right = a.transpose() if layout == TN else a, b.transpose() if layout == NT else b
    result = left.matmul(right, dtype=dtypes.float32).cast(dtype)
    for term in (onto, addend):
        if term is not None:
            result = result.contiguous() + term
    return result.contiguous()


def gpu_product(
    layout: int,
    a: Tensor,
    b: Sequence[Tensor],
    sizes: tuple[int, int, int],
    dtype: DType,
    *,
    packed: Packed | None = None,
    gradient: Gradient | None = None,
    given: Tensor | None = None,
    accumulate: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """A product of these sizes (M, N, K) on a GPU, written to `given` if it is; see `gemm`.

    b is one matrix, or with `packed` integers and what scales them. Few rows of a have a kernel of
    their own, which reads b as it is; for others it is cast to a's type. Raises UnsupportedSize.
    """
    m, n, k = sizes
    dialect, type_name = blocks.language(a)
    if layout == NT and m <= few_rows.MOST_ROWS and dtype == a.dtype and not accumulate:
        stored = packed or blocks.TYPE_NAME[b[0].dtype]
        launch = few_rows.product(dialect, m, n, k, type_name, stored, addend=addend is not None)
        outputs = [empty(m, n, dtype=dtype, device=a.device) if given is None else given]
        return blocks.run(launch, outputs, [a, *b, *_present(addend)], gradient)[0]
    if packed is None:
        b = [b[0].cast(a.dtype)]
    tile = default_tile(dialect, m, n, type_name)
    split, terms = 1, []
    if layout == NN and addend is not None and given is None and packed is None:
        terms = _terms_with(addend, sizes)
        addend = None if terms else addend
    elif given is None and gradient is None and addend is None:
        multiprocessors = blocks.multiprocessors(a.device)
        tile, split = best_cut(dialect, m, n, k, type_name, multiprocessors)
    launch = product(
        dialect, LAYOUTS[layout], m, n, k, type_name, blocks.TYPE_NAME[dtype], tile=tile,
        addend=addend is not None, accumulate=accumulate, packed=packed, split=split,
        terms=1 + len(terms) // 2,
    )  # fmt: skip
    shape, out_type = ((m, n), dtype) if split == 1 else ((split, m, n), dtypes.float32)
    out = empty(*shape, dtype=out_type, device=a.device) if given is None else given
    result = blocks.run(launch, [out], [a, *b, *terms, *_present(addend)], gradient)[0]
    if given is None and addend is None and packed is None:
        products.note(result, layout, sizes, terms=1 + len(terms) // 2, split=split)
    return result if split == 1 else result.sum(0).cast(dtype).contiguous()


def _terms_with(addend: Tensor, sizes: tuple[int, int, int]) -> list[Tensor]:
    """The factors of an addend of a product (NN), if one kernel can compute both."""
    m, n, k = sizes
    found = products.factors(addend, NN)
    fits = len(found) // 2 < MOST_TOGETHER and all(t.shape == (m, k) for t in found[::2])
    return found if fits and found and found[1].shape == (k, n) else []


def _present(addend: Tensor | None) -> list[Tensor]:
    return [] if addend is None else [addend]


def _gemm_cpu(
    layout: int,
    a: Tensor,
    b: Tensor,
    dtype: DType,
    gradient: Gradient | None,
    onto: Tensor | None,
    over: Tensor | None,
    addend: Tensor | None,
) -> Tensor:
    m, n, k = _sizes(layout, a, b)
    given = over if onto is None else onto
    out = empty(m, n, dtype=dtype, device=a.device) if given is None else given
    defines, sizes = gemm_macros(layout, m, n, k, a.dtype, b.dtype, out.dtype)
    defines["ACCUMULATE"] = int(onto is not None)
    if addend is not None:
        defines["ADDEND"] = 1
    updates, headers = onto is not None, gemm_headers(defines)
    kernel = Kernel("gemm.c", defines, sizes, headers, flops=2 * m * n * k, updates=updates)
    inputs = [a, b] if addend is None else [a, b, addend]
    result = run(kernel, [out, per_thread(sizes["SCRATCH_FLOATS"])], inputs, gradient)[0]
    if b.dtype == dtypes.float32 and defines["COMPUTE_BF16"] and "MANY_ROWS" in defines:
        rounded = {**defines, "B_T": TYPE_CODE[dtypes.bfloat16]}
        copies.note(result, replace(kernel, defines=rounded))
    return result


def gemm_macros(
    layout: int, m: int, n: int, k: int, a: DType, b: DType, c: DType
) -> tuple[dict[str, int], dict[str, int]]:
    """The macros and the sizes of cpu/gemm.c for operands and a result of these types."""
    few = layout == NT and m <= FEW_ROWS
    defines = {"LAYOUT": layout}
    defines |= {"A_T": TYPE_CODE[a], "B_T": TYPE_CODE[b], "C_T": TYPE_CODE[c]}
    defines["COMPUTE_BF16"] = int(a == dtypes.bfloat16 and c_kernel.has_bf16_products())
    defines |= {"M": m} if few else {"MANY_ROWS": 1}
    sizes = {} if few else {"M": m}
    scratch = _scratch_floats(m, n, k, c.itemsize == 2)
    if not few and c_kernel.has_amx():
        if defines["COMPUTE_BF16"]:
            defines["TILE_AMX"] = 1
            scratch = _scratch_floats_amx(m, n, k, c.itemsize == 2)
        elif a == dtypes.float32 and _float32_products[-1] == "bfloat16x3":
            defines |= {"TILE_AMX": 1, "BF16X3": 1}
            scratch = _scratch_floats_amx(m, n, 2 * k, narrow=False)  # a number is a pair
    sizes |= {"N": n, "K": k, "SCRATCH_FLOATS": scratch}
    return defines, sizes


def gemm_headers(defines: Mapping[str, int], *packing: str) -> tuple[str, ...]:
    """The files before cpu/gemm.c; `packing` is the one of a B that is stored differently."""
    form = ["tile_vector.h"]
    if "TILE_AMX" in defines:
        form = ["amx.h", *(["bf16x3.h"] if "BF16X3" in defines else []), "tile_amx.h"]
    return ("tile.h", *packing, "pairs.h", "panels.h", *form)


def _scratch_floats_amx(m: int, n: int, k: int, narrow: bool) -> int:
    """As `_scratch_floats`, for panels of bfloat16 pairs and tiles of 32 x 32."""
    slots = -(-k // 2)
    panels = -(-slots // 384)
    block = min(1 << 20, (slots + 32 * panels) * (n + 31))
    partial = 0
    if narrow and panels > 1:
        columns = min(n + 31, (1 << 20) // min(slots, 2048))
        partial = (m + 31 if slots > 2048 else min(m + 31, 512)) * columns
    return -(-(block + 512 * 384 + partial) // 1024) * 1024


def _scratch_floats(m: int, n: int, k: int, narrow: bool) -> int:
    """Floats of packed panels that a thread needs, on any instruction set (see cpu/gemm.c)."""
    panels = -(-k // 320)
    block = min(1 << 20, (k + 4 * panels) * (n + 31))
    partial = 0
    if narrow and k > 320:  # sums of several panels are kept in float32 until they are narrowed
        columns = min(n + 31, (2 << 20) // min(k, 2048))
        partial = (m + 13 if k > 2048 else 256) * columns
    return -(-(block + 131072 + partial) // 1024) * 1024
