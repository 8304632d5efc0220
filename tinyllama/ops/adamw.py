"""AdamW (Loshchilov & Hutter 2019), one pass over each parameter, as torch.optim.AdamW.

g <- grad_scale g
m <- beta1 m + (1 - beta1) g
v <- beta2 v + (1 - beta2) g^2
p <- p - lr weight_decay p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Only 2-D weights decay. Both changes are summed before p changes, so that a decay too small for
1 - lr weight_decay in float32 is not lost.
"""

from tinygrad import Tensor, dtypes

from tinyllama.runtime import kernel

# Order of the numbers an update reads, one float32 tensor on the device.
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
    if kernel.uses_kernels(p, m, v, grad):
        return kernel.run(
            "adamw.c",
            {"DECAY": int(decay)},
            [p, m, v],
            [grad, scalars],
            sizes={"COUNT": p.numel()},
            flops=12 * p.numel(),
            also_read=True,
        )
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


def square_sum(grads: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors: a float32 scalar."""
    total = None
    for grad in grads:
        total = add_square_sum(total, grad)
    assert total is not None
    return total.sum()


def add_square_sum(total: Tensor | None, grad: Tensor) -> Tensor:
    """total plus the sum of grad's squares, both in parts whose sum is meant: (parts,) float32."""
    if kernel.uses_kernels(grad):
        return kernel.run(
            "square_sum.c",
            {"ACCUMULATE": int(total is not None)},
            [kernel.threaded(1).reshape(-1) if total is None else total],
            [grad],
            sizes={"COUNT": grad.numel()},
            flops=2 * grad.numel(),
            also_read=total is not None,
        )[0]
    squares = (grad.float() * grad.float()).sum().reshape(1)
    return (squares if total is None else total + squares).cast(dtypes.float32).contiguous()
