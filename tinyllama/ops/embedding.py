"""Rows of a table by index; the gradient adds each row's gradient back where it was read."""

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import UOp

from tinyllama.ops import kernel


def embedding(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    """ids (B, T) int32 in [0, V), weight (V, H) -> (B, T, H) of type `dtype`.

    A weight that is trained is float32; a frozen one may be narrower.
    """
    if kernel.uses_kernels(weight):
        return _embedding_cpu(ids, weight, dtype)
    return weight[ids].cast(dtype).contiguous().contiguous_backward()


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
