"""y = x / sqrt(mean(x^2) + eps) * w  (Zhang & Sennrich 2019), over the last axis.

With r = 1/sqrt(mean(x^2) + eps) and n = x r, the gradient is
    dx = r (dy w - n mean(dy w n)),   dw = sum over rows of dy n.
"""

from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from tinyllama.runtime import kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H) in the activation type, weight (H,) -> like x; arithmetic in float32."""
    if kernel.uses_kernels(x, weight):
        return _rms_norm_cpu(x, weight.float(), eps)
    y = x.contiguous().float()
    rstd = ((y * y).mean(-1, keepdim=True) + eps).rsqrt()
    return ((y * rstd).cast(x.dtype) * weight.cast(x.dtype)).contiguous()


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    defines = {"N": rows, "H": width, "ACT": kernel.TYPE_CODE[x.dtype]}

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        _, rstd, inputs, w = (Tensor(u) for u in call.src[1:])
        # rstd is read after the forward kernel wrote it, not before.
        rstd = Tensor(rstd.uop.after(call))
        dx, partial = kernel.run(
            "rms_norm_backward.c",
            defines,
            [kernel.empty(*inputs.shape, dtype=inputs.dtype), kernel.threaded(width)],
            [Tensor(grad), inputs, rstd, w],
            flops=10 * rows * width,
        )
        return None, None, dx.uop, partial.sum(0).uop

    out = kernel.run(
        "rms_norm_forward.c",
        defines | {"EPS": f"{eps!r}f"},
        [kernel.empty(*x.shape, dtype=x.dtype), kernel.empty(rows)],
        [x, weight],
        flops=4 * rows * width,
        gradient=gradient,
    )
    return out[0]
