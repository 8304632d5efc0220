"""Rows of a table by index; the gradient adds each row's gradient back where it was read.

With N tokens, V entries and H columns tinygrad's own gradient is a product with one-hot rows, N V H
multiplications. The portable form here sums over the tokens of one id first, N N H, and then copies
sums to where they belong.
"""

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.function import function
from tinygrad.uop.ops import UOp

from tinyllama.runtime import kernel


def embedding(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    """ids (B, T) integers in [0, V), weight (V, H) -> (B, T, H) of type `dtype`.

    A weight that is trained is float32; a frozen one may be narrower.
    """
    ids = ids.cast(dtypes.int32)
    if kernel.uses_kernels(weight):
        return _embedding_cpu(ids, weight, dtype)

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        table, indices = (Tensor(u) for u in call.src[1:])
        return scattered(Tensor(grad), indices, table.shape[0]).uop, None

    def lookup(weight: Tensor, ids: Tensor) -> Tensor:
        return weight[ids].cast(dtype)

    return function(lookup, grad_fxn=gradient)(weight, ids).contiguous().contiguous_backward()


def scattered(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """grad (..., H) summed over equal ids (...): (vocab_size, H) float32, plain tensors alone."""
    rows, flat = grad.reshape(-1, grad.shape[-1]).float().contiguous(), ids.reshape(-1)  # (N, H)
    entries = Tensor.arange(vocab_size, device=ids.device).reshape(-1, 1)
    if rows.shape[0] > vocab_size:
        return ((entries == flat).cast(dtypes.float32) @ rows).contiguous()
    sums = ((flat.reshape(-1, 1) == flat).cast(dtypes.float32) @ rows).contiguous()  # (N, H)
    numbers = Tensor.arange(1, rows.shape[0] + 1, device=ids.device)
    # The last token of each id, counted from 1; 0 for an id that no token has.
    last = (entries == flat).where(numbers, 0).max(1).contiguous()  # (V,)
    found = sums[(last - 1).maximum(0)]  # (V, H)
    return (last > 0).reshape(-1, 1).where(found, 0).contiguous()


def _embedding_cpu(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    vocab_size, width = weight.shape
    defines = {"N": ids.numel(), "V": vocab_size, "H": width, "ACT": kernel.TYPE_CODE[dtype]}
    storage = {"W_T": kernel.TYPE_CODE[weight.dtype]}

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        dw = kernel.run(
            "embedding_backward.c",
            defines,
            [kernel.empty(vocab_size, width, dtype=dtypes.float32)],
            [Tensor(grad), Tensor(call.src[-1])],
            flops=ids.numel() * width,
        )[0]
        return None, dw.uop, None

    out = kernel.empty(*ids.shape, width, dtype=dtype)
    return kernel.run(
        "embedding_forward.c", defines | storage, [out], [weight, ids], gradient=gradient
    )[0]
