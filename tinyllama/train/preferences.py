"""Losses of pairs: a chosen and a rejected answer to the same prompt.

    dpo    -log sigmoid(beta ((c - c0) - (r - r0))),  c, r the log-probabilities of the answers,
           c0, r0 those under the model that training began with (Rafailov et al. 2023, eq. 7)
    orpo   the loss of the chosen text - beta log sigmoid(log odds(c) - log odds(r)),  c, r means
           per token and odds(x) = e^x / (1 - e^x) (Hong et al. 2024, eq. 6 and 7)

Row 2i of a batch is the chosen answer of pair i, row 2i + 1 the rejected one. The head is used
twice: for the loss of each token, from which the loss of a pair follows, and then for the
gradient, in which each token's loss counts by the derivative of that of its pair.
"""

from abc import ABC, abstractmethod
from typing import Any

from tinygrad import Tensor

from tinyllama.config import Config
from tinyllama.ops.cross_entropy import loss_and_gradients, token_losses
from tinyllama.train.losses import HeadGradients, Loss, token_loss

PAIR_OBJECTIVES = ("dpo", "orpo")
_LEAST = 1e-7  # of a mean loss: odds of a certain answer would be infinite


class OfPairs(ABC):
    """What losses of pairs share."""

    measures: tuple[str, ...] = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    needs_reference = False

    @abstractmethod
    def of_losses(self, losses: Tensor, targets: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """From the loss of each token (B, T): the sums (1 + measures,), and the derivative of the
        first with respect to each token's loss (B, T)."""

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor, trains_weight: bool
    ) -> HeadGradients:
        """See Loss."""
        losses = _token_losses(hidden, weight, targets).contiguous()
        sums, shares = self.of_losses(losses, targets, *more)
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        _, d_rows, *d_weight = loss_and_gradients(
            rows, weight, targets.reshape(-1), trains_weight, shares=shares.reshape(-1).contiguous()
        )
        trained = d_weight[0] if d_weight else None
        return HeadGradients(sums, d_rows.reshape(hidden.shape), trained)

    def summed(self, hidden: Tensor, weight: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """See Loss."""
        losses = _token_losses(hidden, weight, targets).contiguous()
        return self.of_losses(losses, targets, *more)[0]

    def count(self, batch: Any) -> int:
        """See Loss: the pairs, without those that only fill the batch."""
        return int((batch.targets >= 0).any(1).sum()) // 2


class DPO(OfPairs):
    """Direct preference optimization. A batch's last part is `log_probabilities` (B,) of its rows
    under the reference. A share `smoothing` of the labels is taken to be wrong."""

    needs_reference = True

    def __init__(self, beta: float, smoothing: float = 0.0) -> None:
        self.beta, self.smoothing = beta, smoothing

    def of_losses(self, losses: Tensor, targets: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """See OfPairs."""
        rewards = self.beta * (-losses.sum(-1) - more[-1]).reshape(-1, 2)  # (pairs, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        wrong = self.smoothing
        loss = (1 - wrong) * _softplus(-margin) + wrong * _softplus(margin)
        d_margin = wrong * margin.sigmoid() - (1 - wrong) * (-margin).sigmoid()
        d_rows = (-self.beta * d_margin).reshape(-1, 1) * _signs(losses)  # (pairs, 2)
        sums = _summed(targets, loss, rewards)
        return sums, _spread(d_rows, targets)


class ORPO(OfPairs):
    """Odds ratio preference optimization. A batch holds more: `answer` (B, T) float32, 1 / length
    at each target of the row's answer; and `text` (B, T) float32, what each target's own loss
    counts: in chosen rows pairs / tokens of the step, so that it is a mean of tokens."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def of_losses(self, losses: Tensor, targets: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """See OfPairs."""
        answer, text = more
        means = -(losses * answer).sum(-1).maximum(_LEAST).reshape(-1, 2)  # (pairs, 2), below 0
        rest = 1 - means.exp()  # probability of anything else
        log_odds = means - rest.log()
        ratio = log_odds[:, 0] - log_odds[:, 1]
        of_text = (losses * text).sum(-1).reshape(-1, 2).sum(-1)
        loss = of_text + self.beta * _softplus(-ratio)
        d_ratio = (-self.beta * (-ratio).sigmoid()).reshape(-1, 1) * _signs(losses)
        d_rows = -d_ratio / rest  # of the mean losses
        sums = _summed(targets, loss, self.beta * means)
        return sums, text + answer * d_rows.reshape(-1, 1)


def log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of each row's targets, summed: (B,) float32, in nats."""
    return -_token_losses(hidden, weight, targets).sum(-1)


def loss_of(config: Config) -> Loss:
    """The loss that training.objective chooses."""
    beta, objective = config.preference.beta, config.training.objective
    if objective == "dpo":
        return DPO(beta, config.preference.label_smoothing)
    return ORPO(beta) if objective == "orpo" else token_loss(config)


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(B, T) float32."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return token_losses(rows, weight, targets.reshape(-1)).reshape(targets.shape)


def _softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x), without overflow."""
    return x.maximum(0) + ((-x.abs()).exp() + 1).log()


def _signs(like: Tensor) -> Tensor:
    """1 for chosen rows, -1 for rejected ones: (1, 2)."""
    return 1 - 2 * Tensor.arange(2, device=like.device).reshape(1, 2).float()


def _is_pair(targets: Tensor) -> Tensor:
    """Which pairs do not only fill the batch: (pairs,)."""
    return (targets >= 0).max(-1).reshape(-1, 2).max(-1)


def _summed(targets: Tensor, loss: Tensor, rewards: Tensor) -> Tensor:
    """The loss of pairs (pairs,) and what is measured, each summed over true pairs: (5,)."""
    margin = rewards[:, 0] - rewards[:, 1]
    parts = Tensor.stack(loss, (margin > 0).float(), margin, rewards[:, 0], rewards[:, 1])
    return _is_pair(targets).where(parts, 0).sum(-1)


def _spread(of_rows: Tensor, targets: Tensor) -> Tensor:
    """of_rows (pairs, 2) at each target of true pairs, else 0: (B, T)."""
    of_rows = _is_pair(targets).reshape(-1, 1).where(of_rows, 0)
    return (targets >= 0).where(of_rows.reshape(-1, 1), 0)
