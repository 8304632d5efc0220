"""Rows of a table by index; the gradient of a row is the sum over the places where it was read.

With N tokens, V entries and H columns, tinygrad's own gradient is a product with one-hot rows:
N V H multiplications. The portable form here first sums over the tokens of each id, N N H, and then
copies the sums to their rows. On a GPU a kernel sorts the tokens by id, and a second one sums.
"""

from collections.abc import Callable

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.ops import forms
from tinyllama.ops.gpu import embedding as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like, with_gradient


def embedding(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    """ids (B, T) integers in [0, V), weight (V, H) -> (B, T, H) of type `dtype`.

    A weight that is trained is float32; a frozen one may be narrower.
    """
    form = forms.choose(weight, portable=_portable, cpu=_cpu, gpu=_gpu)
    return form(ids.cast(dtypes.int32), weight, dtype)


def _portable(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    return _looked_up(ids, weight, dtype, scattered)


def _gpu(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    return _looked_up(ids, weight, dtype, _scattered_gpu)


def _looked_up(
    ids: Tensor, weight: Tensor, dtype: DType, scatter: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    def gradient(dout: Tensor, call: Call) -> list[Tensor | None]:
        weight, ids = call.inputs
        return [scatter(dout, ids, weight.shape[0]), None]

    def lookup(weight: Tensor, ids: Tensor) -> Tensor:
        return weight[ids].cast(dtype)

    out: Tensor = with_gradient(lookup, gradient)(weight, ids)
    return out.contiguous().contiguous_backward()


def scattered(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """grad (..., H) summed over equal ids (...) -> (vocab_size, H) float32."""
    rows, flat = grad.reshape(-1, grad.shape[-1]).float().contiguous(), ids.reshape(-1)  # (N, H)
    entries = Tensor.arange(vocab_size, device=ids.device).reshape(-1, 1)
    if rows.shape[0] > vocab_size:
        return ((entries == flat).cast(dtypes.float32) @ rows).contiguous()
    sums = ((flat.reshape(-1, 1) == flat).cast(dtypes.float32) @ rows).contiguous()  # (N, H)
    numbers = Tensor.arange(1, rows.shape[0] + 1, device=ids.device)
    # The last token of each id, counted from 1; 0 for an id that no token has.
    last = (entries == flat).where(numbers, 0).max(1).contiguous()  # (V,)
    of_last = sums[(last - 1).maximum(0)]  # (V, H)
    return (last > 0).reshape(-1, 1).where(of_last, 0).contiguous()


def _scattered_gpu(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    N, H = ids.numel(), grad.shape[-1]
    dialect, dtype = blocks.language(grad)
    order = gpu.order(dialect, N, vocab_size)
    backward = gpu.backward(dialect, N, vocab_size, H, dtype)
    sorted_ids = blocks.run(order, empty_like(*[ids.reshape(-1)] * 2), [ids])
    outputs = [empty(vocab_size, H, device=grad.device)]
    return blocks.run(backward, outputs, [grad, *sorted_ids])[0]


def _cpu(ids: Tensor, weight: Tensor, dtype: DType) -> Tensor:
    vocab_size, width = weight.shape
    defines = {"N": ids.numel(), "V": vocab_size, "H": width, "ACT": TYPE_CODE[dtype]}
    forward = Kernel("embedding_forward.c", defines | {"W_T": TYPE_CODE[weight.dtype]})
    backward = Kernel("embedding_backward.c", defines, flops=ids.numel() * width)

    def gradient(dout: Tensor, call: Call) -> list[Tensor | None]:
        _, ids = call.inputs
        outputs = [empty(vocab_size, width, device=dout.device)]
        return [run(backward, outputs, [dout, ids])[0], None]

    outputs = [empty(*ids.shape, width, dtype=dtype, device=weight.device)]
    return run(forward, outputs, [weight, ids], gradient)[0]
