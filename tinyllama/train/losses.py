"""What training minimises: a function of the last hidden states and the head's weight.

A loss is a sum over tokens, never a mean: the step divides once, by the trained tokens of all
micro-batches. To add one, write a class that meets `Loss` and give it to `StagedLoss`; the
forward and backward passes below the head do not change.
"""

from typing import NamedTuple, Protocol

from tinygrad import Tensor

from tinyllama.ops.cross_entropy import loss_and_gradients, token_losses


class HeadGradients(NamedTuple):
    """A loss and what the backward pass starts from.

    The three are realized together: kernels turn logits into their gradient in place.
    """

    loss: Tensor  # (1,) float32, summed
    hidden: Tensor  # (B, T, hidden), in the type of the hidden states
    weight: Tensor | None  # (vocab, hidden) float32; None where the weight is not trained


class Loss(Protocol):
    """Targets are int32 (B, T); where one is below 0, the token is not trained."""

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, trains_weight: bool
    ) -> HeadGradients:
        """The loss of hidden states (B, T, hidden) under the head's weight (vocab, hidden)."""
        ...

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of each token for evaluation, (B, T) float32; 0 where nothing is trained."""
        ...


class CrossEntropy:
    """-log softmax(W h)[target], in nats."""

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, trains_weight: bool
    ) -> HeadGradients:
        """See Loss. One pass over chunks of tokens, so that not all logits are held at once."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        loss, d_rows, *d_weight = loss_and_gradients(
            rows, weight, targets.reshape(-1), trains_weight
        )
        trained = d_weight[0] if d_weight else None
        return HeadGradients(loss.reshape(1), d_rows.reshape(hidden.shape), trained)

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """See Loss."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        return token_losses(rows, weight, targets.reshape(-1)).reshape(targets.shape)
