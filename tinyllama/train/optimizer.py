"""AdamW with global-norm clipping.

grad = (sum of gradients) / (trained tokens)            divided once, here
clip = min(1, grad_clip / (||grad|| + 1e-6))             as torch.nn.utils.clip_grad_norm_
AdamW on clip * grad, decay on 2-D weights only          (ops/adamw.py)

A guarded step is left out, by a grad_scale of 0, where the loss or the norm is above a limit.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tinygrad import Tensor

from tinyllama.config import TrainingConfig
from tinyllama.ops.adamw import SCALARS, Parameter, adamw, add_square_sum, together
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import zero_in_background


class AdamW:
    """Optimizer state of named parameters: exp_avg and exp_avg_sq, float32, like each of them."""

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainingConfig, *, blank: bool = False
    ) -> None:
        """A `blank` state holds no memory yet; it is for planning a run."""
        self.config = config
        self.parameters = dict(parameters)
        self.exp_avg = {name: _empty_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: _empty_like(p) for name, p in self.parameters.items()}
        self.stages = {"norm": Stage(), "step": Stage()}
        if not blank:
            zero_in_background(self.state_dict().values())

    def hyperparameters(
        self, step: int, lr: float, trained_tokens: int, limits: Sequence[float] = ()
    ) -> np.ndarray:
        """What `update` reads, for step 1, 2, ...: float32 in the order of SCALARS, then the
        limits of a guarded step, if it is one: the largest summed loss and norm.

        grad_scale is 1 / trained_tokens; `update` multiplies the clipping into it.
        """
        c = self.config
        # The kernel decays by the betas as float32 has them, so the corrections must use those.
        beta1, beta2 = float(np.float32(c.beta1)), float(np.float32(c.beta2))
        values = {
            "lr": lr,
            "beta1": c.beta1,
            "beta2": c.beta2,
            "eps": c.epsilon,
            "weight_decay": c.weight_decay,
            "bias_correction1": 1 - beta1**step,
            "bias_correction2": 1 - beta2**step,
            "grad_scale": 1 / trained_tokens,
        }
        return np.array([*(values[name] for name in SCALARS), *limits], np.float32)

    def update(
        self, grads: Mapping[str, Tensor], hyperparameters: Tensor, guard: Tensor | None = None
    ) -> Tensor:
        """One step from summed gradients, in place. It is left out where `guard`, the summed loss
        (1,), or the norm is not at most its limit; a NaN is not.

        Returns the norm of the mean gradient before clipping, (1,) float32.
        """
        squares, groups = None, list(self._groups(grads))
        for group in groups:
            squares = self._add_squares(squares, [parameter.grad for parameter in group])
        assert squares is not None, "there is nothing to train"
        norm, scalars = self._scale(squares, hyperparameters, guard)
        for group in groups:
            self._step(group, scalars)
        return norm

    def _groups(self, grads: Mapping[str, Tensor]) -> Iterator[list[Parameter]]:
        """The parameters, as many at once as the device takes; only matrices decay."""
        parameters = [
            Parameter(p, self.exp_avg[name], self.exp_avg_sq[name], grads[name], p.ndim >= 2)
            for name, p in self.parameters.items()
        ]
        size = together(parameters[0].p) if parameters else 1
        for first in range(0, len(parameters), size):
            yield parameters[first : first + size]

    # Each piece below is scheduled once for all groups of the same shapes (runtime/stage.py).

    def _add_squares(self, total: Tensor | None, grads: list[Tensor]) -> Tensor:
        known = grads if total is None else [total, *grads]
        return self.stages["norm"](known, lambda: [add_square_sum(total, grads)])[0]

    def _scale(
        self, squares: Tensor, hyperparameters: Tensor, guard: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        last = len(SCALARS) - 1

        def build() -> list[Tensor]:
            scale = hyperparameters[last : last + 1]
            norm = (squares.sum().sqrt().reshape(1) * scale).contiguous()
            if self.config.grad_clip:
                scale = scale * (self.config.grad_clip / (norm + 1e-6)).minimum(1.0)
            if guard is not None:
                most_loss, most_norm = hyperparameters[-2:-1], hyperparameters[-1:]
                scale = ((guard <= most_loss) & (norm <= most_norm)).where(scale, 0)
            return [norm, hyperparameters[:last].cat(scale).contiguous()]

        known = [squares, hyperparameters] if guard is None else [squares, hyperparameters, guard]
        norm, scalars = self.stages["norm"](known, build, ("scale", len(known)))
        return norm, scalars

    def _step(self, group: list[Parameter], scalars: Tensor) -> None:
        known = [tensor for parameter in group for tensor in parameter.tensors]
        self.stages["step"]([*known, scalars], lambda: adamw(group, scalars))

    def state_dict(self) -> dict[str, Tensor]:
        """exp_avg.NAME and exp_avg_sq.NAME for every parameter."""
        first = {f"exp_avg.{name}": t for name, t in self.exp_avg.items()}
        return first | {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}


def _empty_like(tensor: Tensor) -> Tensor:
    return Tensor.empty(*tensor.shape, device=tensor.device)
