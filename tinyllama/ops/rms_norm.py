"""y = x / sqrt(mean(x^2) + eps) * w  (Zhang & Sennrich 2019), over the last axis.

With r = 1/sqrt(mean(x^2) + eps) and n = x r, the gradient is
    dx = r (dy w - n mean(dy w n)),   dw = sum over rows of dy n.
"""

from tinygrad import Tensor

from tinyllama.ops import forms, sums
from tinyllama.ops.gpu import rms_norm as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H) in the activation type, weight (H,) -> like x; arithmetic in float32."""
    return forms.choose(x, weight, portable=_portable, cpu=_cpu, gpu=_gpu)(x, weight, eps)


def _portable(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.contiguous().float()
    rstd = ((y * y).mean(-1, keepdim=True) + eps).rsqrt()
    return ((y * rstd).cast(x.dtype) * weight.cast(x.dtype)).contiguous()


def _cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    defines = {"N": rows, "H": width, "ACT": TYPE_CODE[x.dtype]}
    with_eps = defines | {"EPS": f"{eps!r}f"}
    forward = Kernel("rms_norm_forward.c", with_eps, flops=4 * rows * width)
    backward = Kernel("rms_norm_backward.c", defines, flops=10 * rows * width)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        _, rstd = call.outputs
        x, weight = call.inputs
        outputs = [empty(*x.shape, dtype=x.dtype, device=x.device), per_thread(width)]
        dx, partial = run(backward, outputs, [dy, x, rstd, weight])
        return [dx, partial.sum(0)]

    outputs = [empty(*x.shape, dtype=x.dtype, device=x.device), empty(rows, device=x.device)]
    return run(forward, outputs, [x, weight.float()], gradient)[0]


def _gpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    dialect, dtype = blocks.language(x)
    forward = gpu.forward(dialect, rows, width, dtype, eps)
    partial_rows = gpu.partial_rows(rows)

    def pull_back(
        dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *addend: Tensor
    ) -> list[Tensor]:
        """dx [+ addend], and sums of dw."""
        launch = gpu.backward(dialect, rows, width, dtype, addend=bool(addend))
        outputs = [*empty_like(x), empty(partial_rows, width, device=x.device)]
        return blocks.run(launch, outputs, [dy, x, rstd, weight, *addend])

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        _, rstd = call.outputs
        x, weight = call.inputs
        dx, partial = pull_back(dy, x, rstd, weight)
        dx = sums.remember(dx, [dy, x, rstd, weight], pull_back)
        column_sum = gpu.column_sum(dialect, partial_rows, width)
        return [dx, blocks.run(column_sum, empty_like(weight), [partial])[0]]

    outputs = [*empty_like(x), empty(rows, device=x.device)]
    return blocks.run(forward, outputs, [x, weight.float()], gradient)[0]
