"""AdamW (Loshchilov & Hutter 2019), one pass over each parameter, as torch.optim.AdamW.

g <- grad_scale g
m <- beta1 m + (1 - beta1) g
v <- beta2 v + (1 - beta2) g^2
p <- p - lr weight_decay p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Only 2-D weights decay. Both changes are summed before p changes, so that a decay too small for
1 - lr weight_decay in float32 is not lost.
"""

from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.runtime.c_kernel import Kernel, per_thread, run

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


def adamw(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, scalars: Tensor, decay: bool
) -> list[Tensor]:
    """Update p, m, v (float32, one shape) in place; returns what must be realized for it."""
    form = forms.choose(p, m, v, grad, portable=_adamw_portable, cpu=_adamw_cpu)
    return form(p, m, v, grad, scalars, decay)


def _adamw_portable(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, scalars: Tensor, decay: bool
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
    return [p.assign(p - change), m.assign(new_m), v.assign(new_v)]


def _adamw_cpu(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, scalars: Tensor, decay: bool
) -> list[Tensor]:
    count = p.numel()
    adamw = Kernel(
        "adamw.c", {"DECAY": int(decay)}, {"COUNT": count}, flops=12 * count, updates=True
    )
    return run(adamw, [p, m, v], [grad, scalars])


def square_sum(grads: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors: a float32 scalar."""
    total = None
    for grad in grads:
        total = add_square_sum(total, grad)
    assert total is not None
    return total.sum()


def add_square_sum(total: Tensor | None, grad: Tensor) -> Tensor:
    """total plus the sum of grad's squares, both in parts to be added up: (parts,) float32."""
    form = forms.choose(grad, portable=_add_square_sum_portable, cpu=_add_square_sum_cpu)
    return form(total, grad)


def _add_square_sum_portable(total: Tensor | None, grad: Tensor) -> Tensor:
    squares = (grad.float() * grad.float()).sum().reshape(1)
    return (squares if total is None else total + squares).cast(dtypes.float32).contiguous()


def _add_square_sum_cpu(total: Tensor | None, grad: Tensor) -> Tensor:
    count, adds = grad.numel(), total is not None
    square_sum = Kernel(
        "square_sum.c", {"ACCUMULATE": int(adds)}, {"COUNT": count}, flops=2 * count, updates=adds
    )
    return run(square_sum, [per_thread(1).reshape(-1) if total is None else total], [grad])[0]
