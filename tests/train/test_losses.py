"""A loss meets its contract, and training takes any that does."""

import numpy as np
import pytest
from model_helpers import GROUPED, build, difference, loss_and_gradients, on_device, random_batch
from tinygrad import Tensor

from tinyllama.ops import forms
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.losses import CrossEntropy, HeadGradients


def reference(hidden, weight, targets):
    """Loss of each token and its gradient of hidden states and weight, in float64."""
    logits = hidden @ weight.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)  # (B, T, vocab)
    one_hot = np.eye(len(weight))[np.maximum(targets, 0)]
    trained = (targets >= 0)[..., None]
    losses = np.where(trained[..., 0], -np.log((p * one_hot).sum(-1)), 0)
    d_logits = np.where(trained, p - one_hot, 0)
    return losses, d_logits @ weight, np.einsum("btv,bth->vh", d_logits, hidden)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_cross_entropy_is_the_formula_for_each_token_and_in_sum(form):
    rng = np.random.default_rng(3)
    hidden, weight = rng.standard_normal((2, 5, 8)), rng.standard_normal((11, 8))
    targets = rng.integers(0, 11, (2, 5))
    targets[:, 3] = -1
    tensors = [Tensor(x.astype(np.float32)).realize() for x in (hidden, weight)]
    tensors.append(Tensor(targets.astype(np.int32)).realize())
    losses, d_hidden, d_weight = reference(hidden, weight, targets)
    with forms.forced(form):
        found = CrossEntropy().gradients(*tensors, trains_weight=True)
        Tensor.realize(*found)
        assert found.loss.shape == (1,)
        assert found.loss.item() == pytest.approx(losses.sum(), rel=1e-5)
        assert difference(found.hidden.numpy(), d_hidden) < 1e-5
        assert difference(found.weight.numpy(), d_weight) < 1e-5
        assert difference(CrossEntropy().per_token(*tensors).numpy(), losses) < 1e-5
        assert CrossEntropy().gradients(*tensors, trains_weight=False).weight is None


class Doubled(CrossEntropy):
    """Twice the cross entropy: a loss of somebody else's."""

    def gradients(self, hidden, weight, targets, *, trains_weight):
        found = super().gradients(hidden, weight, targets, trains_weight=trains_weight)
        return HeadGradients(*(part * 2 for part in found))

    def per_token(self, hidden, weight, targets):
        return super().per_token(hidden, weight, targets) * 2


def test_training_takes_any_loss_that_meets_the_contract():
    loss, grads = loss_and_gradients(GROUPED)
    with forms.forced("cpu"):
        model, batch = build(GROUPED), on_device(random_batch(GROUPED))
        staged = StagedLoss(model, model.state_dict(), Doubled())
        doubled, found = staged.gradients(*batch)
        assert staged.loss(*batch).item() == pytest.approx(2 * loss, rel=1e-6)
    assert doubled.item() == pytest.approx(2 * loss, rel=1e-6)
    assert found.keys() == grads.keys()
    for name, gradient in found.items():
        assert difference(read(gradient), 2 * grads[name]) < 1e-5, name
