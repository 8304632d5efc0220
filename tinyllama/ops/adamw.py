"""AdamW (Loshchilov & Hutter 2019), one pass over each parameter, as torch.optim.AdamW.

g <- grad_scale g
m <- beta1 m + (1 - beta1) g
v <- beta2 v + (1 - beta2) g^2
p <- p - lr weight_decay p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Only 2-D weights decay. Both changes are summed before p changes, so that a decay too small for
1 - lr weight_decay in float32 is not lost. A grad_scale of 0 leaves p, m and v as they are,
whatever the gradients hold: the step is left out.

The same pass may write a copy of p in a smaller type, which products read (copies.py). m and v may
be bfloat16, rounded stochastically (Gupta et al. 2015, arXiv:1502.02551): up or down, each with the
probability that makes the expected value the number itself. To nearest, the small changes of a
moment (1 - beta2 of it) would be lost. Random bits are a hash of the key of a step and of the
element's index among those of all parameters, so all forms round alike, and a resumed run too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.gpu import adamw as gpu
from tinyllama.ops.random_bits import random_bits
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
# Two more for a state in bfloat16: the key of its random bits, whole numbers below KEY_LIMIT, which
# float32 holds exactly.
KEY_WORDS, KEY_LIMIT = 2, 1 << 24


class Parameter(NamedTuple):
    """What a step updates (p float32, m and v float32 or bfloat16, of one shape) and reads of a
    parameter; `copy`, if there is one, gets p in its own type."""

    p: Tensor
    m: Tensor
    v: Tensor
    grad: Tensor
    decay: bool
    copy: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        known = self.p, self.m, self.v, self.grad
        return known if self.copy is None else (*known, self.copy)


def together(parameters: Sequence[Parameter]) -> tuple[int, int]:
    """How many of these parameters `add_square_sum` and `adamw` should be given at once."""
    some = parameters[0]
    if forms.chosen(some.p) != "gpu":
        return 1, 1
    dialect, _ = blocks.language(some.p)
    copies = any(parameter.copy is not None for parameter in parameters)
    state = blocks.TYPE_NAME[some.m.dtype]
    return gpu.MOST_TENSORS[dialect], gpu.most_tensors(dialect, state=state, copies=copies)


def adamw(
    parameters: Sequence[Parameter], scalars: Tensor, firsts: Tensor | None = None
) -> list[Tensor]:
    """Update parameters in place; returns what must be realized for it.

    `scalars` are float32. A state in bfloat16 needs the key among them, and `firsts`, the index of
    each parameter's first element, (parameters,) uint32.
    """
    tensors = [tensor for parameter in parameters for tensor in parameter.tensors]
    form = forms.choose(*tensors, portable=_adamw_portable, cpu=_adamw_cpu, gpu=_adamw_gpu)
    return form(parameters, scalars, firsts)


def _adamw_portable(
    parameters: Sequence[Parameter], scalars: Tensor, firsts: Tensor | None
) -> list[Tensor]:
    results = []
    for place, parameter in enumerate(parameters):
        first = None if firsts is None else firsts[place : place + 1]
        results += _updated(*parameter, scalars, first)
    return results


def _updated(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    decay: bool,
    copy: Tensor | None,
    scalars: Tensor,
    first: Tensor | None,
) -> list[Tensor]:
    lr, beta1, beta2, eps, weight_decay, correction1, correction2, scale, *_ = scalars.split(1)
    g = grad.float() * scale.reshape(*(1,) * p.ndim)
    ones = (1,) * p.ndim
    old_m, old_v = m.float(), v.float()
    new_m = (old_m * beta1.reshape(ones) + g * (1 - beta1).reshape(ones)).contiguous()
    new_v = (old_v * beta2.reshape(ones) + g * g * (1 - beta2).reshape(ones)).contiguous()
    denominator = new_v.sqrt() / correction2.sqrt().reshape(ones) + eps.reshape(ones)
    change = (lr / correction1).reshape(ones) * new_m / denominator
    if decay:
        change = change + (lr * weight_decay).reshape(ones) * p
    counts = (scale != 0).reshape(ones)
    new_p = counts.where(p - change, p)
    if first is not None:
        new_m, new_v = _rounded_randomly(new_m, new_v, scalars, first)
    if copy is not None:
        new_p = new_p.contiguous()
    changed = [
        p.assign(new_p),
        m.assign(counts.where(new_m, m)),
        v.assign(counts.where(new_v, v)),
    ]
    return changed if copy is None else [*changed, copy.assign(new_p.cast(copy.dtype))]


def _rounded_randomly(m: Tensor, v: Tensor, scalars: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    """m and v in bfloat16, by the lower and the upper half of each element's random bits."""
    key = scalars[len(SCALARS) :].cast(dtypes.uint32)
    bits = random_bits(key, m.numel(), first).reshape(m.shape)
    return rounded_by(m, bits & 0xFFFF), rounded_by(v, bits >> 16)


def rounded_by(x: Tensor, random: Tensor) -> Tensor:
    """x float32 in bfloat16: away from 0 if its lower half and `random`, uint32 below 2^16, have a
    carry, else towards 0. A NaN stays one."""
    bits = x.bitcast(dtypes.uint32)
    kept = (x != x).where(bits | 0x400000, bits + random) >> 16
    return kept.cast(dtypes.uint16).bitcast(dtypes.bfloat16)


def _adamw_cpu(
    parameters: Sequence[Parameter], scalars: Tensor, firsts: Tensor | None
) -> list[Tensor]:
    results = []
    for p, m, v, grad, decay, copy in parameters:
        count, randomly = p.numel(), firsts is not None
        defines = {"DECAY": int(decay), "COPY": int(copy is not None), "STATE_T": int(randomly)}
        headers = ["pairs.h"] * (copy is not None) + ["../random_bits.h"] * randomly
        kernel = Kernel(
            "adamw.c", defines, {"COUNT": count}, headers, flops=12 * count, updates=True
        )
        outputs = [p, m, v] if copy is None else [p, m, v, copy]
        results += run(kernel, outputs, [grad, scalars, *([] if firsts is None else [firsts])])
    return results


def _adamw_gpu(
    parameters: Sequence[Parameter], scalars: Tensor, firsts: Tensor | None
) -> list[Tensor]:
    dialect, dtype = blocks.language(parameters[0].grad)
    counts, decays = [q.p.numel() for q in parameters], [q.decay for q in parameters]
    copies = [q.copy for q in parameters if q.copy is not None]
    launch = gpu.step(
        dialect, counts, decays, dtype,
        state=blocks.TYPE_NAME[parameters[0].m.dtype],
        copies=[q.copy is not None for q in parameters],
        copy=blocks.TYPE_NAME[copies[0].dtype] if copies else "bfloat16",
    )  # fmt: skip
    outputs = [*(t for q in parameters for t in (q.p, q.m, q.v)), *copies]
    inputs = [*(q.grad for q in parameters), scalars, *([] if firsts is None else [firsts])]
    return blocks.run(launch, outputs, inputs)


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
