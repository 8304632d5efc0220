"""AdamW with global-norm clipping.

grad = (sum of gradients) / (trained tokens)            divided once, here
clip = min(1, grad_clip / (||grad|| + 1e-6))             as torch.nn.utils.clip_grad_norm_
AdamW on clip * grad, decay on 2-D weights only          (ops/adamw.py)

A guarded step is left out, by a grad_scale of 0, where the loss or the norm is above a limit.
Besides the parameters, an update may write copies of them that products read (ops/copies.py).
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.config import TrainingConfig
from tinyllama.model.llama import Llama
from tinyllama.ops.adamw import (
    KEY_LIMIT,
    KEY_WORDS,
    SCALARS,
    Parameter,
    adamw,
    add_square_sum,
    together,
)
from tinyllama.ops.copies import copied, pay
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import write_new, zero_in_background


class AdamW:
    """Optimizer state of named parameters: exp_avg and exp_avg_sq like each of them, in the type
    `optimizer_state`; and copies of some of them."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: TrainingConfig,
        *,
        copied: Sequence[str] = (),
        blank: bool = False,
    ) -> None:
        """The parameters `copied` get copies in the type of activations. A `blank` state holds no
        memory yet; it is for planning a run."""
        self.config = config
        self.parameters = dict(parameters)
        self.dtype = getattr(dtypes, config.optimizer_state)
        self.exp_avg = {name: _empty_like(p, self.dtype) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: _empty_like(p, self.dtype) for name, p in self.parameters.items()}
        narrow = getattr(dtypes, config.dtype)
        self.copies = {name: _empty_like(self.parameters[name], narrow) for name in copied}
        self.stages = {"norm": Stage(), "step": Stage()}
        self._firsts: dict[int, Tensor] = {}  # of each group, by its first parameter's number
        if not blank:
            zero_in_background([*self.state_dict().values(), *self.copies.values()])

    @property
    def scalar_count(self) -> int:
        """How many numbers `update` reads, besides limits."""
        return len(SCALARS) + (KEY_WORDS if self.rounds_randomly else 0)

    @property
    def rounds_randomly(self) -> bool:
        """Whether the state is bfloat16, rounded stochastically."""
        return self.config.optimizer_state == "bfloat16"

    def hyperparameters(
        self, step: int, lr: float, trained_tokens: int, limits: Sequence[float] = ()
    ) -> np.ndarray:
        """What `update` reads, for step 1, 2, ...: float32 in the order of SCALARS, the key of the
        random bits if the state is rounded by those, then the limits of a guarded step, if it is
        one: the largest summed loss and norm.

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
        key = self._key(step) if self.rounds_randomly else ()
        return np.array([*(values[name] for name in SCALARS), *key, *limits], np.float32)

    def _key(self, step: int) -> Sequence[int]:
        entropy = [self.config.seed, zlib.crc32(b"optimizer state"), step]
        words: list[int] = (np.random.SeedSequence(entropy).generate_state(KEY_WORDS)).tolist()
        return [word % KEY_LIMIT for word in words]

    def copy_weights(self) -> None:
        """Write the copies of the parameters as they are now; an update keeps them up to date."""
        for name, copy in self.copies.items():
            weight = self.parameters[name]
            self.stages["step"]([weight, copy], lambda: copied([weight], [copy]), "copy")  # noqa: B023

    def update(
        self, grads: Mapping[str, Tensor], hyperparameters: Tensor, guard: Tensor | None = None
    ) -> Tensor:
        """One step from summed gradients, in place. It is left out where `guard`, the summed loss
        (1,), or the norm is not at most its limit; a NaN is not.

        Returns the norm of the mean gradient before clipping, (1,) float32.
        """
        parameters = list(self._parameters(grads))
        assert parameters, "there is nothing to train"
        in_norm, in_step = together(parameters)
        squares = None
        for _, group in _groups(parameters, in_norm):
            squares = self._add_squares(squares, [parameter.grad for parameter in group])
        assert squares is not None
        norm, scalars = self._scale(squares, hyperparameters, guard)
        for number, group in _groups(parameters, in_step):
            self._step(group, scalars, self._indices(parameters, number, len(group)))
        return norm

    def _parameters(self, grads: Mapping[str, Tensor]) -> Iterator[Parameter]:
        """What a step reads and changes; only matrices decay."""
        for name, p in self.parameters.items():
            m, v, copy = self.exp_avg[name], self.exp_avg_sq[name], self.copies.get(name)
            yield Parameter(p, m, v, grads[name], p.ndim >= 2, copy)

    def _indices(self, parameters: Sequence[Parameter], number: int, count: int) -> Tensor | None:
        """Where the indices of `count` parameters from `number` on begin, among those of all
        elements; None if nothing is rounded randomly."""
        if not self.rounds_randomly:
            return None
        if number not in self._firsts:
            sizes = np.array([0, *(q.p.numel() for q in parameters)], np.uint64).cumsum()
            firsts = sizes[number : number + count].astype(np.uint32)  # the hash takes 32 bits
            tensor = Tensor.empty(count, dtype=dtypes.uint32, device=parameters[0].p.device)
            # At once: a step that is being captured would record a copy as one of its kernels.
            write_new(tensor, firsts)
            self._firsts[number] = tensor
        return self._firsts[number]

    # Each piece below is scheduled once for all groups of the same shapes (runtime/stage.py).

    def _add_squares(self, total: Tensor | None, grads: list[Tensor]) -> Tensor:
        known = grads if total is None else [total, *grads]
        return self.stages["norm"](known, lambda: [add_square_sum(total, grads)])[0]

    def _scale(
        self, squares: Tensor, hyperparameters: Tensor, guard: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        last, count = len(SCALARS) - 1, self.scalar_count

        def build() -> list[Tensor]:
            scale = hyperparameters[last : last + 1]
            norm = (squares.sum().sqrt().reshape(1) * scale).contiguous()
            if self.config.grad_clip:
                scale = scale * (self.config.grad_clip / (norm + 1e-6)).minimum(1.0)
            if guard is not None:
                most_loss, most_norm = hyperparameters[-2:-1], hyperparameters[-1:]
                scale = ((guard <= most_loss) & (norm <= most_norm)).where(scale, 0)
            key = [hyperparameters[last + 1 : count]] if self.rounds_randomly else []
            return [norm, hyperparameters[:last].cat(scale, *key).contiguous()]

        known = [squares, hyperparameters] if guard is None else [squares, hyperparameters, guard]
        norm, scalars = self.stages["norm"](known, build, ("scale", len(known)))
        return norm, scalars

    def _step(self, group: Sequence[Parameter], scalars: Tensor, indices: Tensor | None) -> None:
        known = [tensor for parameter in group for tensor in parameter.tensors]
        more = [scalars] if indices is None else [scalars, indices]
        self.stages["step"]([*known, *more], lambda: adamw(group, scalars, indices))

    def state_dict(self) -> dict[str, Tensor]:
        """exp_avg.NAME and exp_avg_sq.NAME for every parameter."""
        first = {f"exp_avg.{name}": t for name, t in self.exp_avg.items()}
        return first | {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}


def weights_to_copy(model: Llama, trained: Mapping[str, Tensor]) -> list[str]:
    """The names of trained weights whose copies make a step faster, if memory allows them."""
    names = [name for name in model.multiplied() if name in trained]
    return names if names and pay(trained[names[0]], model.dtype) else []


def _groups(
    parameters: Sequence[Parameter], size: int
) -> Iterator[tuple[int, Sequence[Parameter]]]:
    """The parameters, `size` at once, with the number of the first."""
    for first in range(0, len(parameters), size):
        yield first, parameters[first : first + size]


def _empty_like(tensor: Tensor, dtype: DType) -> Tensor:
    return Tensor.empty(*tensor.shape, dtype=dtype, device=tensor.device)
