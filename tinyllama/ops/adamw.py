"""AdamW (Loshchilov & Hutter 2019), one pass over each parameter, as torch.optim.AdamW.

g <- grad_scale g
m <- beta1 m + (1 - beta1) g
v <- beta2 v + (1 - beta2) g^2
p <- p - lr weight_decay p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Only 2-D weights decay. Both changes are summed before p changes, so that a decay too small for
1 - lr weight_decay in float32 is not lost. A grad_scale of 0 leaves p, m and v as they are,
whatever the gradients hold: the step is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.gpu import adamw as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.c_kernel import Kernel, per_thread, run
from tinyllama.runtime.kernel import empty

# Order of the numbers that an update reads: one float32 tensor on the device.
SCALARS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "bias_correction1",
    "bias_correction2",
    "grad_scale",
)


class Parameter(NamedTuple):
    """What a step updates (p, m, v: float32, one shape) and reads of a parameter."""

    p: Tensor
    m: Tensor
    v: Tensor
    grad: Tensor
    decay: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.p, self.m, self.v, self.grad


def together(tensor: Tensor) -> int:
    """How many parameters like this one `adamw` and `add_square_sum` should be given at once."""
    if forms.chosen(tensor) != "gpu":
        return 1
    return gpu.MOST_TENSORS[blocks.language(tensor)[0]]


def adamw(parameters: Sequence[Parameter], scalars: Tensor) -> list[Tensor]:
    """Update parameters in place; returns what must be realized for it."""
    tensors = [tensor for parameter in parameters for tensor in parameter.tensors]
    form = forms.choose(*tensors, portable=_adamw_portable, cpu=_adamw_cpu, gpu=_adamw_gpu)
    return form(parameters, scalars)


def _adamw_portable(parameters: Sequence[Parameter], scalars: Tensor) -> list[Tensor]:
    return [t for parameter in parameters for t in _updated(*parameter, scalars)]


def _updated(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, decay: bool, scalars: Tensor
) -> list[Tensor]:
    lr, beta1, beta2, eps, weight_decay, correction1, correction2, scale = scalars.split(1)
    g = grad.float() * scale.reshape(*(1,) * p.ndim)
    ones = (1,) * p.ndim
    new_m = (m * beta1.reshape(ones) + g * (1 - beta1).reshape(ones)).contiguous()
    new_v = (v * beta2.reshape(ones) + g * g * (1 - beta2).reshape(ones)).contiguous()
    denominator = new_v.sqrt() / correction2.sqrt().reshape(ones) + eps.reshape(ones)
    change = (lr / correction1).reshape(ones) * new_m / denominator
    if decay:
        change = change + (lr * weight_decay).reshape(ones) * p
    counts = (scale != 0).reshape(ones)
    return [
        p.assign(counts.where(p - change, p)),
        m.assign(counts.where(new_m, m)),
        v.assign(counts.where(new_v, v)),
    ]


def _adamw_cpu(parameters: Sequence[Parameter], scalars: Tensor) -> list[Tensor]:
    results = []
    for p, m, v, grad, decay in parameters:
        count = p.numel()
        defines, sizes = {"DECAY": int(decay)}, {"COUNT": count}
        kernel = Kernel("adamw.c", defines, sizes, flops=12 * count, updates=True)
        results += run(kernel, [p, m, v], [grad, scalars])
    return results


def _adamw_gpu(parameters: Sequence[Parameter], scalars: Tensor) -> list[Tensor]:
    dialect, dtype = blocks.language(parameters[0].grad)
    counts, decays = [q.p.numel() for q in parameters], [q.decay for q in parameters]
    launch = gpu.step(dialect, counts, decays, dtype)
    outputs = [t for q in parameters for t in (q.p, q.m, q.v)]
    return blocks.run(launch, outputs, [*(q.grad for q in parameters), scalars])


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors: a float32 scalar."""
    return add_square_sum(None, grads).sum()


def add_square_sum(total: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    """total plus the sum of grads' squares, both in parts to be added up: (parts,) float32."""
    form = forms.choose(
        *grads,
        portable=_add_square_sum_portable,
        cpu=_add_square_sum_cpu,
        gpu=_add_square_sum_gpu,
    )
    return form(total, grads)


def _add_square_sum_portable(total: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    for grad in grads:
        squares = (grad.float() * grad.float()).sum().reshape(1)
        total = squares if total is None else total + squares
        total = total.cast(dtypes.float32).contiguous()
    assert total is not None
    return total


def _add_square_sum_cpu(total: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    for grad in grads:
        count, adds = grad.numel(), total is not None
        defines, sizes = {"ACCUMULATE": int(adds)}, {"COUNT": count}
        kernel = Kernel("square_sum.c", defines, sizes, flops=2 * count, updates=adds)
        total = run(kernel, [per_thread(1).reshape(-1) if total is None else total], [grad])[0]
    assert total is not None
    return total


def _add_square_sum_gpu(total: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    dialect, dtype = blocks.language(grads[0])
    most = gpu.MOST_TENSORS[dialect]
    for first in range(0, len(grads), most):
        some = grads[first : first + most]
        counts, adds = [grad.numel() for grad in some], total is not None
        launch = gpu.square_sum(dialect, counts, dtype, accumulate=adds)
        parts = empty(gpu.NORM_BLOCKS, device=grads[0].device) if total is None else total
        total = blocks.run(launch, [parts], some)[0]
    assert total is not None
    return total
