"""Softmax cross entropy of x W^T against targets, summed, without keeping the logits.

The logits (tokens x vocabulary) are the largest tensor of a small model. They are made for a
chunk of tokens at a time; the same pass turns them into their gradient, softmax - one_hot, and
multiplies that back, so that loss, dx and dW leave together and the chunk is forgotten.
A target of -1 is not trained: its loss and gradient are zero. One beyond the vocabulary has the
loss NaN, which stops a run.
"""

import math

from tinygrad import Tensor, dtypes
from tinygrad.function import function
from tinygrad.uop.ops import UOp

from tinyllama.ops.matmul import (
    NN,
    NT,
    TN,
    gemm,
    linear,
)
from tinyllama.runtime import kernel

# Largest chunk of logits, in elements: 64 MB of float32.
CHUNK_ELEMENTS = 16 * 1024 * 1024


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, weight_gradient: bool = True
) -> Tensor:
    """x (N, H), weight (V, H) float32, targets (N,) integers -> summed loss, a float32 scalar.

    Unit: nats, summed over the trained tokens; the caller divides once, by their number.
    """

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        scale = Tensor(grad)
        dx = Tensor(call.gettuple(1)) * scale.cast(x.dtype)
        dw = (Tensor(call.gettuple(2)) * scale).uop if weight_gradient else None
        return dx.uop, dw, None

    forward = function(loss_and_gradients, grad_fxn=gradient)
    return forward(x, weight, targets, weight_gradient)[0]


def token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token, for evaluation: shapes as above -> (N,) float32 nats."""
    parts, targets = [], targets.cast(dtypes.int32)
    for begin, end in _chunks(x.shape[0], weight.shape[0]):
        logits = linear(x[begin:end].contiguous(), weight)
        loss, _ = _softmax_loss(logits, targets[begin:end], gradient=False)
        parts.append(loss)
    return parts[0].cat(*parts[1:]) if len(parts) > 1 else parts[0]


def loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, weight_gradient: bool
) -> tuple[Tensor, ...]:
    """Summed loss, its gradient of x and, if asked for, of the weight, in one pass over chunks."""
    losses, dxs, dw, free = [], [], None, None
    targets = targets.cast(dtypes.int32)
    for begin, end in _chunks(x.shape[0], weight.shape[0]):
        rows = x[begin:end].contiguous()
        logits = _logits(rows, weight, free)
        loss, dlogits = _softmax_loss(logits, targets[begin:end], gradient=True)
        losses.append(loss.sum())
        dxs.append(_product(NN, dlogits, weight, rows))
        if weight_gradient:
            dw = _add_product(dlogits, rows, dw)
        free = kernel.after(dlogits, [dxs[-1]] if dw is None else [dxs[-1], dw])
    total = sum(losses[1:], losses[0])
    dx = dxs[0].cat(*dxs[1:], dim=0).contiguous() if len(dxs) > 1 else dxs[0]
    return (total, dx, dw) if dw is not None else (total, dx)


def _chunks(tokens: int, vocab_size: int) -> list[tuple[int, int]]:
    """Row ranges whose logits stay under CHUNK_ELEMENTS, all of one size but the last."""
    count = -(-tokens // max(1, CHUNK_ELEMENTS // vocab_size))
    size = -(-tokens // count)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(rows: Tensor, weight: Tensor, free: Tensor | None) -> Tensor:
    """rows weight^T, (N, V). `free` holds logits that nobody reads any more: chunks that wait for
    each other share that memory, where tinygrad would make the logits of all chunks first."""
    if kernel.uses_kernels(rows, weight):
        fits = free is not None and free.shape == (rows.shape[0], weight.shape[0])
        return gemm(NT, rows, weight, dtype=rows.dtype, over=free if fits else None)
    return linear(rows, weight)


def _softmax_loss(logits: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,) float32, and the logits turned into their gradient (N, V)."""
    if kernel.uses_kernels(logits):
        N, V = logits.shape
        defines = {"N": N, "V": V, "ACT": kernel.TYPE_CODE[logits.dtype], "GRADIENT": int(gradient)}
        outputs = [logits, kernel.empty(N)]
        out = kernel.run(
            "cross_entropy.c", defines, outputs, [targets], flops=6 * N * V, also_read=True
        )
        return out[1], out[0]
    scores = logits.float()
    trained = targets >= 0
    one_hot = Tensor.arange(scores.shape[1], device=scores.device) == targets.reshape(-1, 1)
    shifted = scores - scores.max(-1, keepdim=True)
    exps = shifted.exp()
    total = exps.sum(-1, keepdim=True).contiguous()
    picked = one_hot.where(shifted, 0).sum(-1)
    loss = trained.where(total.reshape(-1).log() - picked, 0)
    # A target that has no logit: NaN, which stops a run.
    known = targets < scores.shape[1]
    loss = known.where(loss, math.nan).contiguous()
    dlogits = (trained & known).reshape(-1, 1).where(exps / total - one_hot.cast(dtypes.float32), 0)
    return loss, dlogits.cast(logits.dtype).contiguous()


def _product(layout: int, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a b, of the type of `like`."""
    if kernel.uses_kernels(a, b):
        return gemm(layout, a, b, dtype=like.dtype)
    return (a @ b.cast(a.dtype)).cast(like.dtype).contiguous()


def _add_product(dlogits: Tensor, rows: Tensor, onto: Tensor | None) -> Tensor:
    """onto + dlogits^T rows, float32 (V, H)."""
    if kernel.uses_kernels(dlogits, rows):
        return gemm(TN, dlogits, rows, onto=onto)
    product = dlogits.transpose().matmul(rows, dtype=dtypes.float32)
    return (product if onto is None else onto + product).contiguous()
