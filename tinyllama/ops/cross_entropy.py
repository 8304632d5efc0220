"""Softmax cross entropy of x W^T against targets, summed, without keeping the logits.

The logits (tokens x vocabulary) are the largest tensor of a small model. They are computed for a
chunk of tokens at a time. The same pass turns them into their gradient, softmax - one_hot, and
computes dx and dW from it, so that the memory of a chunk is reused for the next one.
A target of -1 is not trained: its loss and gradient are zero. A target beyond the vocabulary has
the loss NaN, which stops a run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.gpu import cross_entropy as gpu
from tinyllama.ops.matmul import (
    NN,
    NT,
    TN,
    gemm,
    linear,
)
from tinyllama.ops.soft_targets import SoftTargets
from tinyllama.runtime import blocks, sources
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, after, empty, with_gradient

# Largest chunk of logits, in elements: 64 MB of float32. GPU_CHUNKS as many on a GPU, whose kernels
# need more rows to be fast.
CHUNK_ELEMENTS = 16 * 1024 * 1024
GPU_CHUNKS = 8


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, weight_gradient: bool = True
) -> Tensor:
    """x (N, H), weight (V, H) float32, targets (N,) integers -> summed loss, a float32 scalar.

    Unit: nats, summed over the trained tokens; the caller divides once by their number.
    """

    def gradient(dloss: Tensor, call: Call) -> list[Tensor | None]:
        _, dx, *dw = call.outputs
        return [dx * dloss.cast(dx.dtype), dw[0] * dloss if dw else None, None]

    forward = with_gradient(loss_and_gradients, gradient)
    loss: Tensor = forward(x, weight, targets, weight_gradient)[0]
    return loss


class _Form(NamedTuple):
    """The parts of which one form of the loss consists."""

    # rows (N, H), weight (V, H), logits (N, V) whose memory is free or None -> logits (N, V)
    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # logits (N, V), targets (N,), whether the gradient is needed -> losses (N,), gradient (N, V)
    softmax_loss: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    # dlogits (N, V), weight (V, H) -> dx (N, H)
    x_gradient: Callable[[Tensor, Tensor], Tensor]
    # dlogits (N, V), rows (N, H), what it is added to (V, H) -> dW (V, H)
    weight_gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    chunks: int = 1  # of CHUNK_ELEMENTS that a chunk may have


def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, soft: SoftTargets | None = None
) -> Tensor:
    """The loss of each token, for evaluation: shapes as above -> (N,) float32 nats."""
    form = _FORMS[forms.chosen(x, weight)]
    parts, targets = [], targets.cast(dtypes.int32)
    for begin, end in _chunks(x.shape[0], weight.shape[0], form.chunks):
        logits = form.logits(x[begin:end].contiguous(), weight, None)
        softmax_loss = form.softmax_loss if soft is None else soft.rows(begin, end)
        loss, _ = softmax_loss(logits, targets[begin:end], False)
        parts.append(loss)
    return parts[0].cat(*parts[1:]) if len(parts) > 1 else parts[0]


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_gradient: bool,
    soft: SoftTargets | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Summed loss, its gradient of x and, with `weight_gradient`, of the weight: one pass.

    `soft` is another loss than that of the target alone; `shares` (N,) float32 multiply each
    token's loss.
    """
    form = _FORMS[forms.chosen(x, weight)]
    losses, dxs, dw, free = [], [], None, None
    targets = targets.cast(dtypes.int32)
    for begin, end in _chunks(x.shape[0], weight.shape[0], form.chunks):
        rows = x[begin:end].contiguous()
        logits = form.logits(rows, weight, free)
        softmax_loss = form.softmax_loss if soft is None else soft.rows(begin, end)
        loss, dlogits = softmax_loss(logits, targets[begin:end], True)
        with sources.gradients():
            dx = form.x_gradient(dlogits, weight)
        done = [dx]
        if shares is not None:  # a row of dlogits times a number is that of dx, and of rows in dW
            share = shares[begin:end]
            loss, dx = loss * share, _times(dx, share)
            rows = _times(rows, share)
        losses.append(loss.sum())
        dxs.append(dx)
        if weight_gradient:
            with sources.gradients():
                dw = form.weight_gradient(dlogits, rows, dw)
            done.append(dw)
        free = after(dlogits, done)
    total = sum(losses[1:], losses[0])
    dx = dxs[0].cat(*dxs[1:], dim=0).contiguous() if len(dxs) > 1 else dxs[0]
    return (total, dx, dw) if dw is not None else (total, dx)


def _times(rows: Tensor, shares: Tensor) -> Tensor:
    """rows (N, H), each multiplied by its share (N,) in float32."""
    return (rows.float() * shares.reshape(-1, 1)).cast(rows.dtype).contiguous()


def _chunks(tokens: int, vocab_size: int, chunks: int = 1) -> list[tuple[int, int]]:
    """Row ranges whose logits stay under `chunks` CHUNK_ELEMENTS, all of one size but the last."""
    count = -(-tokens // max(1, chunks * CHUNK_ELEMENTS // vocab_size))
    size = -(-tokens // count)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits_portable(rows: Tensor, weight: Tensor, _free: Tensor | None) -> Tensor:
    return linear(rows, weight)


def _softmax_loss_portable(
    logits: Tensor, targets: Tensor, _gradient: bool
) -> tuple[Tensor, Tensor]:
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


def _x_gradient_portable(dlogits: Tensor, weight: Tensor) -> Tensor:
    return (dlogits @ weight.cast(dlogits.dtype)).contiguous()


def _weight_gradient_portable(dlogits: Tensor, rows: Tensor, onto: Tensor | None) -> Tensor:
    product = dlogits.transpose().matmul(rows, dtype=dtypes.float32)
    return (product if onto is None else onto + product).contiguous()


def _logits_kernel(rows: Tensor, weight: Tensor, free: Tensor | None) -> Tensor:
    """Written over `free`, so that chunks run one after another; otherwise tinygrad would compute
    the logits of all chunks first."""
    fits = free is not None and free.shape == (rows.shape[0], weight.shape[0])
    return gemm(NT, rows, weight, dtype=rows.dtype, over=free if fits else None)


def _softmax_loss_cpu(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    N, V = logits.shape
    defines = {"N": N, "V": V, "ACT": TYPE_CODE[logits.dtype], "GRADIENT": int(gradient)}
    softmax_loss = Kernel(
        "cross_entropy.c", defines, headers=["softmax.h"], flops=6 * N * V, updates=True
    )
    dlogits, loss = run(softmax_loss, [logits, empty(N, device=logits.device)], [targets])
    return loss, dlogits


def _softmax_loss_gpu(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    N, V = logits.shape
    dialect, dtype = blocks.language(logits)
    launch = gpu.softmax_loss(dialect, N, V, dtype, gradient=gradient)
    dlogits, loss = blocks.run(launch, [logits, empty(N, device=logits.device)], [targets])
    return loss, dlogits


def _x_gradient_kernel(dlogits: Tensor, weight: Tensor) -> Tensor:
    return gemm(NN, dlogits, weight, dtype=dlogits.dtype)


def _weight_gradient_kernel(dlogits: Tensor, rows: Tensor, onto: Tensor | None) -> Tensor:
    return gemm(TN, dlogits, rows, onto=onto)


_PORTABLE = _Form(
    _logits_portable, _softmax_loss_portable, _x_gradient_portable, _weight_gradient_portable
)
_CPU = _Form(_logits_kernel, _softmax_loss_cpu, _x_gradient_kernel, _weight_gradient_kernel)
_GPU = _CPU._replace(softmax_loss=_softmax_loss_gpu, chunks=GPU_CHUNKS)
_FORMS: dict[forms.Form, _Form] = {"portable": _PORTABLE, "cpu": _CPU, "gpu": _GPU}
