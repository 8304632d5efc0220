"""One optimizer step: gradients of the summed loss over the micro-batches, then the update.

    grads = sum over micro-batches of d(summed loss)/d(parameters)
    parameters, state = AdamW(grads / trained tokens, clipped)

A batch that fits into memory is one compiled graph. If it does not, one graph adds the gradients of
a micro-batch to buffers, and another updates the parameters. Each graph is captured at its first
call, so nothing is compiled or scheduled twice. One small tensor (loss, norm) is read back per
step.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor

from tinyllama.data.batches import Rows
from tinyllama.model.llama import Llama
from tinyllama.observe.anomalies import Limits
from tinyllama.runtime.account import Account, account
from tinyllama.runtime.capture import captured
from tinyllama.runtime.plan import Plan, plan
from tinyllama.runtime.stage import Stage
from tinyllama.runtime.storage import Inputs, fill_zero
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.losses import Loss
from tinyllama.train.optimizer import AdamW

NO_LIMITS = Limits()


class StepResult(NamedTuple):
    """Of one step: mean loss in nats per token (or per pair), norm of the mean gradient, trained
    tokens, means of what else the loss measures, by name, and whether the update was made."""

    loss: float
    grad_norm: float
    tokens: int
    measures: Mapping[str, float] = MappingProxyType({})
    applied: bool = True


class TrainStep:
    """Trains `optimizer.parameters` of `model`; call it with the micro-batches of one step."""

    def __init__(
        self,
        model: Llama,
        optimizer: AdamW,
        micro_batches: int,
        around: Callable[[int, int], AbstractContextManager[None]] = lambda *_: nullcontext(),
        loss: Loss | None = None,
        *,
        guarded: bool = False,
    ) -> None:
        """`around(step, micro_batch)` is entered for each pass forward and back (dropout); the loss
        is cross entropy if none is given. An update is left out if the step is `guarded` and its
        loss or norm exceeds the limits."""
        self.optimizer, self.around = optimizer, around
        self.staged = StagedLoss(model, optimizer.parameters, loss, optimizer.copies)
        self.micro_batches, self.guarded = micro_batches, guarded
        self._batch, self._numbers = Inputs(), Inputs()
        self._whole = captured(self._whole_step)
        self._accumulate = captured(self._accumulate_step)
        self._row_tokens: int | None = None  # the length that these two are captured for
        self._of_other_lengths: dict[int, Any] = {}
        self._update = captured(self._update_step)
        self._add_stage = Stage()
        self._sums: dict[str, Tensor] = {}
        self._summed_loss = Tensor.empty(1 + len(self.staged.criterion.measures))
        self._planned_gradients: list[Tensor] = []  # the captured graph's gradients, for `plans`
        self.weights_were_written = True  # by others than the optimizer
        if micro_batches > 1:
            self._sums = {name: Tensor.empty(*p.shape) for name, p in optimizer.parameters.items()}

    def __call__(
        self,
        batches: Sequence[Rows],
        step: int,
        lr: float,
        limits: Limits = NO_LIMITS,
        left_out: int = 0,
    ) -> StepResult:
        """Run step number `step` (1, 2, ...) on its micro-batches. `limits` are those of a guarded
        step, `left_out` the updates that were left out before."""
        assert len(batches) == self.micro_batches
        if self.weights_were_written:
            self.optimizer.copy_weights()
            self.weights_were_written = False
        tokens = sum(int((b.targets >= 0).sum()) for b in batches)
        count = max(sum(map(self.staged.criterion.count, batches)), 1)
        most = self._most(limits, count)
        numbers = self.optimizer.hyperparameters(step - left_out, lr, count, most)
        (hyperparameters,) = self._numbers(numbers)
        if self.micro_batches == 1:
            with self.around(step, 0):
                whole = self._for_rows(batches[0], self._whole, self._whole_step)
                result = whole(*self._batch(*batches[0]), hyperparameters)
        else:
            self._clear_sums()
            for number, batch in enumerate(batches):
                with self.around(step, number):
                    add = self._for_rows(batch, self._accumulate, self._accumulate_step)
                    add(*self._batch(*batch))
            result = self._update(hyperparameters)
        summed_loss, *measured, norm = result.numpy().tolist()
        applied = all(seen <= limit for seen, limit in zip((summed_loss, norm), most, strict=False))
        means = (value / count for value in measured)
        measures = dict(zip(self.staged.criterion.measures, means, strict=True))
        return StepResult(summed_loss / count, norm, tokens, measures, applied)

    def _most(self, limits: Limits, count: int) -> tuple[float, ...]:
        """The largest summed loss and norm, as the device has them; none without a guard."""
        if not self.guarded:
            return ()
        most, largest = np.array([limits.loss * count, limits.grad_norm]), np.finfo(np.float32).max
        return tuple(np.minimum(most, largest).astype(np.float32).tolist())

    @property
    def hyperparameter_count(self) -> int:
        """How many numbers a step reads besides its batch."""
        return self.optimizer.scalar_count + 2 * self.guarded

    def _for_rows(self, batch: Rows, graph: Any, function: Callable[..., Any]) -> Any:
        """The graph for rows of the batch's length: `graph` for the first length that is met."""
        length = batch.tokens.shape[1]
        self._row_tokens = self._row_tokens or length
        if length == self._row_tokens:
            return graph
        if length not in self._of_other_lengths:
            self._of_other_lengths[length] = captured(function)
        return self._of_other_lengths[length]

    def take_over(self, planned: "TrainStep") -> None:
        """Reuse what a step of the same configuration scheduled when it was planned (`plans`)."""
        self.staged.stages, self._add_stage = planned.staged.stages, planned._add_stage
        self.optimizer.stages = planned.optimizer.stages

    def sums(self) -> list[Tensor]:
        """The buffers in which gradients are summed over the micro-batches of a step."""
        return list(self._sums.values())

    def plans(self, *batch: Tensor, hyperparameters: Tensor) -> list[Plan]:
        """The memory of each graph of a step, for a micro-batch's tensors; nothing runs."""
        if self.micro_batches == 1:
            return [self._plan(self._whole_step, *batch, hyperparameters)]
        return [
            self._plan(self._accumulate_step, *batch),
            self._plan(self._update_step, hyperparameters),
        ]

    def account(self, *batch: Tensor, hyperparameters: Tensor, compiling: bool = False) -> Account:
        """What a step costs that is one graph, for its three tensors; nothing runs."""
        assert self.micro_batches == 1
        return account(self._whole_step, [*batch, hyperparameters], compiling)

    def _plan(self, function: Callable[..., Any], *inputs: Tensor) -> Plan:
        self._planned_gradients = []
        return plan(function, inputs, lambda: self._planned_gradients)

    def _gradients(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss and measures, and the gradient of the loss by parameter name."""
        loss, grads = self.staged.gradients(*batch)
        self._planned_gradients = list(grads.values())
        return loss, grads

    def _whole_step(self, *inputs: Tensor) -> Tensor:
        *batch, hyperparameters = inputs
        loss, grads = self._gradients(batch)
        return self._finish(loss, grads, hyperparameters)

    def _accumulate_step(self, *batch: Tensor) -> None:
        loss, grads = self._gradients(batch)
        self._add(self._summed_loss, loss)
        for name, grad in grads.items():
            self._add(self._sums[name], grad)

    def _add(self, total: Tensor, part: Tensor) -> None:
        self._add_stage([total, part], lambda: [total.assign(total + part)])

    def _update_step(self, hyperparameters: Tensor) -> Tensor:
        return self._finish(self._summed_loss, self._sums, hyperparameters)

    def _finish(self, loss: Tensor, grads: Mapping[str, Tensor], hyperparameters: Tensor) -> Tensor:
        # `loss` goes on with what else is measured, which is no reason to leave an update out.
        guard = loss[:1] if self.guarded else None
        norm = self.optimizer.update(grads, hyperparameters, guard)
        return self._add_stage([loss, norm], lambda: [loss.cat(norm).contiguous()], "result")[0]

    def _clear_sums(self) -> None:
        for tensor in (self._summed_loss, *self._sums.values()):
            fill_zero(tensor)
