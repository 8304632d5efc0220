"""Losses of pairs by their formulas, in each form, and the reference under adapters."""

import numpy as np
import pytest
from lora_helpers import placed_on, with_adapters
from model_helpers import GROUPED, build, difference, on_device
from tinygrad import Tensor, dtypes

from tinyllama.data.batches import Batch
from tinyllama.model.lora import adapter_tensors
from tinyllama.ops import forms
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.preferences import DPO, ORPO

B, T, H, V = 6, 5, 8, 11
BETA = 0.4


def head_inputs():
    """Three pairs, the last of which only fills the batch."""
    rng = np.random.default_rng(1)
    hidden, weight = rng.standard_normal((B, T, H)), rng.standard_normal((V, H))
    targets = rng.integers(0, V, (B, T))
    targets[:, :1], targets[1, 3:], targets[4:] = -1, -1, -1
    return hidden, weight, targets


def log_probabilities(hidden, weight, targets):
    """Of each target in float64, 0 where there is none."""
    logits = hidden @ weight.T
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_q, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets >= 0, picked, 0)


def dpo(hidden, weight, targets, reference, smoothing=0.0):
    rewards = BETA * (log_probabilities(hidden, weight, targets).sum(1) - reference)
    margin = rewards[0:4:2] - rewards[1:4:2]
    losses = (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))
    measured = (margin > 0).sum(), margin.sum(), rewards[0:4:2].sum(), rewards[1:4:2].sum()
    return np.array([losses.sum(), *measured])


def orpo(hidden, weight, targets, answer, text):
    log_p = log_probabilities(hidden, weight, targets)
    means = (log_p * answer).sum(1)[:4]
    odds = np.exp(means) / (1 - np.exp(means))
    ratio = np.log(odds[0::2] / odds[1::2])
    loss = -(log_p * text).sum() + BETA * np.log1p(np.exp(-ratio)).sum()
    rewards = BETA * means
    margin = rewards[0::2] - rewards[1::2]
    return np.array(
        [loss, (margin > 0).sum(), margin.sum(), rewards[0::2].sum(), rewards[1::2].sum()]
    )


def more_of(objective, targets):
    rng = np.random.default_rng(2)
    if objective is not ORPO:
        return [-5 * rng.random(B)]
    answer = (targets >= 0) / np.maximum((targets >= 0).sum(1, keepdims=True), 1)
    text = (targets >= 0) * (np.arange(B) % 2 == 0)[:, None] * 0.3
    return [answer, text]


def by_differences(function, x, step=1e-6):
    grad = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[place] += step
        low[place] -= step
        grad[place] = (function(high)[0] - function(low)[0]) / (2 * step)
    return grad


@pytest.mark.parametrize("form", ["cpu", "portable"])
@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (DPO(BETA), dpo),
        (DPO(BETA, 0.2), lambda *inputs: dpo(*inputs, smoothing=0.2)),
        (ORPO(BETA), orpo),
    ],
    ids=["dpo", "dpo, smoothed", "orpo"],
)
def test_loss_measures_and_gradients_are_those_of_the_formula(loss, formula, form):
    hidden, weight, targets = head_inputs()
    more = more_of(type(loss), targets)
    expected = formula(hidden, weight, targets, *more)
    tensors = on_device([x.astype(np.float32) for x in (hidden, weight)])
    tensors += on_device([targets.astype(np.int32), *(x.astype(np.float32) for x in more)])
    with forms.forced(form):
        found = loss.gradients(*tensors, trains_weight=True)
        Tensor.realize(*found)
        alone = loss.summed(*tensors).numpy()
        frozen = loss.gradients(*tensors, trains_weight=False)
    assert found.loss.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert alone == pytest.approx(expected, rel=1e-5, abs=1e-5)
    of_hidden = by_differences(lambda x: formula(x, weight, targets, *more), hidden)
    of_weight = by_differences(lambda x: formula(hidden, x, targets, *more), weight)
    assert difference(found.hidden.numpy(), of_hidden) < 1e-5
    assert difference(found.weight.numpy(), of_weight) < 1e-5
    assert frozen.weight is None


def pairs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, GROUPED.vocab_size, (4, 21)).astype(np.int32)
    targets = np.roll(tokens, -1, 1)
    targets[:, -1], targets[:, :6] = -1, -1
    return Batch(tokens, targets, np.zeros_like(tokens))


def gradients(form, dtype=dtypes.float32, recompute=False):
    """Of adapters that hold something, under DPO with the frozen base as the reference."""
    with forms.forced(form):
        model = build(GROUPED, dtype=dtype)
        model.checkpoint_activations = recompute
        with_adapters(model, placed_on(model, ("q_proj", "down_proj")))
        trained = adapter_tensors(model)
        loss, grads = StagedLoss(model, trained, DPO(BETA)).gradients(*on_device(pairs()))
        return loss.numpy(), {name: read(grad).copy() for name, grad in grads.items()}


def test_forms_and_recomputation_give_the_same():
    loss, grads = gradients("cpu")
    assert loss[0] != pytest.approx(2 * np.log(2), abs=1e-2)
    for other in (gradients("portable"), gradients("cpu", recompute=True)):
        assert other[0] == pytest.approx(loss, rel=1e-4)
        for name, grad in grads.items():
            assert difference(other[1][name], grad) < 1e-4, name
    narrow, narrow_grads = gradients("cpu", dtypes.bfloat16)
    assert narrow[0] == pytest.approx(loss[0], rel=0.1)
    assert all(np.isfinite(grad).all() for grad in narrow_grads.values())


def test_the_reference_of_adapters_is_the_base():
    batch = on_device(pairs())
    known = StagedLoss(build(GROUPED)).log_probabilities(*batch).numpy()
    model = build(GROUPED)
    with_adapters(model, placed_on(model, ("q_proj", "down_proj")))
    staged = StagedLoss(model, adapter_tensors(model), DPO(BETA))
    (reference,) = staged._reference(*batch)
    assert (reference.numpy() == known).all()
    assert difference(staged.log_probabilities(*batch).numpy(), known) > 1e-3
    given = StagedLoss(model, None, DPO(BETA))
    given.refers = False
    rows = Tensor(known).realize()
    assert given.loss(*batch, rows).numpy() == pytest.approx(staged.loss(*batch).numpy(), rel=1e-5)
