"""What training minimises: a function of the last hidden states and the head's weight.

A loss is a sum over tokens or pairs, never a mean: the step divides once, by what all its
micro-batches hold of them (`count`). To add one, write a class that meets `Loss` and give it to
`StagedLoss`; the forward and backward passes below the head do not change. Losses of pairs are in
preferences.py.
"""

from typing import Any, NamedTuple, Protocol

from tinygrad import Tensor

from tinyllama.config import Config
from tinyllama.ops.cross_entropy import loss_and_gradients, token_losses
from tinyllama.ops.soft_targets import SoftTargets


class HeadGradients(NamedTuple):
    """A loss and what the backward pass starts from.

    The three are realized together: kernels turn logits into their gradient in place.
    """

    loss: Tensor  # (1 + measures,) float32: the summed loss, and sums of what else is measured
    hidden: Tensor  # (B, T, hidden), in the type of the hidden states
    weight: Tensor | None  # (vocab, hidden) float32; None where the weight is not trained


class Loss(Protocol):
    """Targets are int32 (B, T); where one is below 0, the token is not trained. `more` are what a
    batch holds besides tokens, targets and starts."""

    measures: tuple[str, ...]  # names of what is summed besides the loss
    # Whether `more` ends with the losses of each token under the frozen base, (B, T) float32,
    # which a model with adapters computes itself.
    needs_reference: bool

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor, trains_weight: bool
    ) -> HeadGradients:
        """The loss of hidden states (B, T, hidden) under the head's weight (vocab, hidden)."""
        ...

    def summed(self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """The first part of `gradients` alone, for evaluation: (1 + measures,) float32."""
        ...

    def count(self, batch: Any) -> int:
        """What the loss of a batch is divided by: its trained tokens, or its pairs."""
        ...


class OfTokens:
    """What losses of single tokens share."""

    measures: tuple[str, ...] = ()
    needs_reference = False

    def soft_targets(self, *_: Tensor) -> SoftTargets | None:
        """What a token is compared with besides its target, from what the batch holds more."""
        return None

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor, trains_weight: bool
    ) -> HeadGradients:
        """See Loss. One pass over chunks of tokens, so that not all logits are held at once."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        loss, d_rows, *d_weight = loss_and_gradients(
            rows, weight, targets.reshape(-1), trains_weight, self.soft_targets(*more)
        )
        trained = d_weight[0] if d_weight else None
        return HeadGradients(loss.reshape(1), d_rows.reshape(hidden.shape), trained)

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """The loss of each token for evaluation, (B, T) float32; 0 where nothing is trained."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        soft = self.soft_targets(*more)
        return token_losses(rows, weight, targets.reshape(-1), soft).reshape(targets.shape)

    def summed(self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """See Loss."""
        return self.per_token(hidden, weight, targets, *more).sum().reshape(1)

    def count(self, batch: Any) -> int:
        """See Loss: the trained tokens."""
        return int((batch.targets >= 0).sum())


class CrossEntropy(OfTokens):
    """-log softmax(W h)[target], in nats."""


class SmoothedCrossEntropy(OfTokens):
    """Cross entropy with label smoothing and z-loss (ops/soft_targets.py)."""

    def __init__(self, smoothing: float, z_loss: float) -> None:
        self.smoothing, self.z_loss = smoothing, z_loss

    def soft_targets(self, *_: Tensor) -> SoftTargets:
        """See OfTokens."""
        return SoftTargets(self.smoothing, self.z_loss)


class Distillation(OfTokens):
    """A share of cross entropy, and for the rest the distance from a teacher's distribution.

    A batch holds more: its ids (B, T, K) int32 and logits (B, T, K) float32 of the K most likely
    tokens, whose probabilities at the temperature are made to sum to 1.
    """

    def __init__(self, smoothing: float, z_loss: float, alpha: float, temperature: float) -> None:
        self.smoothing, self.z_loss = smoothing, z_loss
        self.alpha, self.temperature = alpha, temperature

    def soft_targets(self, *more: Tensor) -> SoftTargets:
        """See OfTokens."""
        ids, logits = (t.reshape(-1, t.shape[-1]) for t in more)  # (B * T, K)
        p = (logits * (1 / self.temperature)).softmax(-1).contiguous()
        return SoftTargets(self.smoothing, self.z_loss, self.alpha, self.temperature, ids, p)


def token_loss(config: Config) -> Loss:
    """The loss of single tokens that [training] and [distillation] choose."""
    t, d = config.training, config.distillation
    if t.objective == "distill":
        return Distillation(t.label_smoothing, t.z_loss, d.alpha, d.temperature)
    if t.label_smoothing or t.z_loss:
        return SmoothedCrossEntropy(t.label_smoothing, t.z_loss)
    return CrossEntropy()
