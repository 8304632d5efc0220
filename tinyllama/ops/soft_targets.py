"""Losses over a vocabulary beyond the target's own: smoothed, with z-loss, with a teacher.

    hard = log Z - (1 - e) x[target] - e mean(x) + z (log Z)^2,          Z = sum(exp(x))
    soft = KL(teacher || student) at the temperature t, over the teacher's most likely tokens
    loss = a hard + (1 - a) t^2 soft

e is label smoothing (Szegedy et al. 2016), z the weight of z-loss (Chowdhery et al. 2022), soft the
distillation of Hinton et al. 2015. As in cross_entropy.py, one pass turns a chunk of logits into
its gradient. Targets below 0 are not trained, others beyond the vocabulary have the loss NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from tinygrad import Tensor

from tinyllama.ops import forms
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, empty

# logits (N, V), targets (N,), whether the gradient is needed -> losses (N,), gradient (N, V)
SoftmaxLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class SoftTargets(NamedTuple):
    """What tokens are compared with besides their targets.

    `ids` (N, K) int32 and `probabilities` (N, K) float32, which sum to 1, are the teacher's; ids
    are within the vocabulary and differ within a row. `hard` is the share a of the first part.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    hard: float = 1.0
    temperature: float = 1.0
    ids: Tensor | None = None
    probabilities: Tensor | None = None

    @property
    def soft(self) -> float:
        """The factor of the second part; 0 without a teacher."""
        return 0.0 if self.ids is None else (1 - self.hard) * self.temperature**2

    def rows(self, begin: int, end: int) -> SoftmaxLoss:
        """The loss of the logits of rows begin .. end - 1."""
        part = self
        if self.ids is not None and self.probabilities is not None:
            ids, probabilities = (t[begin:end] for t in (self.ids, self.probabilities))
            part = self._replace(ids=ids, probabilities=probabilities)
        return functools.partial(softmax_loss, part)


def softmax_loss(
    soft: SoftTargets, logits: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses (N,) float32 of logits (N, V), and their gradient in the type of the logits."""
    form = forms.choose(logits, portable=_portable, cpu=_cpu)
    return form(soft, logits, targets, gradient)


def _portable(
    soft: SoftTargets, logits: Tensor, targets: Tensor, _gradient: bool
) -> tuple[Tensor, Tensor]:
    x = logits.float()
    V = x.shape[1]
    trained, known = targets >= 0, targets < V
    vocabulary = Tensor.arange(V, device=x.device)
    one_hot = vocabulary == targets.reshape(-1, 1)
    softmax, log_z = _softmax(x)
    picked = one_hot.where(x, 0).sum(-1)
    loss = log_z - (1 - soft.smoothing) * picked - soft.smoothing * x.mean(-1)
    loss = soft.hard * (loss + soft.z_loss * log_z * log_z)
    d = softmax * (1 + 2 * soft.z_loss * log_z).reshape(-1, 1)
    d = soft.hard * (d - (1 - soft.smoothing) * one_hot.float() - soft.smoothing / V)
    if soft.ids is not None and soft.probabilities is not None:
        tempered, log_sum = _softmax(x * (1 / soft.temperature))
        p, is_id = soft.probabilities, soft.ids.unsqueeze(-1) == vocabulary  # (N, K, V)
        wanted = is_id.where(p.unsqueeze(-1), 0).sum(1)  # (N, V)
        entropy = (p > 0).where(p * (p > 0).where(p, 1).log(), 0).sum(-1)
        of_p = (wanted * x).sum(-1) * (1 / soft.temperature)
        loss = loss + soft.soft * (entropy - of_p + log_sum * p.sum(-1))
        d = d + (soft.soft / soft.temperature) * (tempered - wanted)
    loss = known.where(trained.where(loss, 0), math.nan).contiguous()
    d = (trained & known).reshape(-1, 1).where(d, 0)
    return loss, d.cast(logits.dtype).contiguous()


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """softmax (N, V) and the logarithm of its denominator (N,)."""
    highest = x.max(-1, keepdim=True)
    exps = (x - highest).exp()
    total = exps.sum(-1, keepdim=True).contiguous()
    return exps / total, total.reshape(-1).log() + highest.reshape(-1)


def _cpu(
    soft: SoftTargets, logits: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    N, V = logits.shape
    teacher = [t for t in (soft.ids, soft.probabilities) if t is not None]
    K = 0 if soft.ids is None else soft.ids.shape[1]
    numbers = {"EPS": soft.smoothing, "ZW": soft.z_loss, "TEMP": soft.temperature}
    numbers |= {"HARD": soft.hard, "SOFT": soft.soft}
    sizes = {"N": N, "V": V, "K": K, "ACT": TYPE_CODE[logits.dtype], "GRADIENT": int(gradient)}
    defines = sizes | {name: float(value) for name, value in numbers.items()}
    kernel = Kernel(
        "soft_targets.c", defines, headers=["softmax.h"], flops=12 * N * V, updates=True
    )
    inputs = [targets, *(t.contiguous() for t in teacher)]
    dlogits, loss = run(kernel, [logits, empty(N, device=logits.device)], inputs)
    return loss, dlogits
