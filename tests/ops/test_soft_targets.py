"""Smoothed targets, z-loss and a teacher's distribution, in each form, by the formulas."""

import numpy as np
import pytest
from model_helpers import difference
from tinygrad import Tensor, dtypes

from tinyllama.ops import cross_entropy, forms
from tinyllama.ops.cross_entropy import loss_and_gradients, token_losses
from tinyllama.ops.soft_targets import SoftTargets

N, H, V, K = 9, 16, 37, 5
CASES = {
    "smoothed": {"smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "teacher": {"hard": 0.3, "temperature": 2.0},
    "teacher alone": {"hard": 0.0, "temperature": 0.5},
    "all": {"smoothing": 0.2, "z_loss": 0.02, "hard": 0.6, "temperature": 1.5},
}


def numbers(case, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((N, H)), rng.standard_normal((V, H))
    targets = rng.integers(0, V, N)
    targets[3] = -1
    ids = np.stack([rng.permutation(V)[:K] for _ in range(N)])
    if targets[0] not in ids[0]:
        ids[0, 2] = targets[0]  # a target that is also the teacher's
    p = rng.random((N, K))
    p[1, 0] = 0
    return x, weight, targets, ids, p / p.sum(1, keepdims=True), rng.standard_normal(N)


def log_softmax(x):
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def reference(logits, targets, ids, p, smoothing=0.0, z_loss=0.0, hard=1.0, temperature=1.0):
    """Loss of each token in float64."""
    log_q, log_z = log_softmax(logits), (logits - log_softmax(logits))[:, 0]
    picked = np.take_along_axis(log_q, np.maximum(targets, 0)[:, None], 1)[:, 0]
    loss = hard * (-(1 - smoothing) * picked - smoothing * log_q.mean(1) + z_loss * log_z**2)
    if ids is not None:
        soft = np.take_along_axis(log_softmax(logits / temperature), ids, 1)
        log_p = np.log(np.where(p > 0, p, 1))
        loss += (1 - hard) * temperature**2 * (p * (log_p - soft)).sum(1)
    return np.where(targets >= 0, loss, 0)


def together(*inputs):
    """Loss and gradients as arrays: kernels write gradients over logits, so none comes alone."""
    found = loss_and_gradients(*inputs)
    Tensor.realize(*found)
    return [part.float().numpy() for part in found]


def by_differences(function, x, step=1e-5):
    grad = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[place] += step
        low[place] -= step
        grad[place] = (function(high) - function(low)) / (2 * step)
    return grad


@pytest.mark.parametrize("form", ["cpu", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case, form):
    x, weight, targets, ids, p, shares = numbers(case)
    options = CASES[case]
    teacher = (ids, p) if "hard" in options else (None, None)

    def total(x, weight):
        return (reference(x @ weight.T, targets, *teacher, **options) * shares).sum()

    tensors = [Tensor(a.astype(np.float32)).realize() for a in (x, weight)]
    given = [Tensor(targets.astype(np.int32)).realize(), Tensor(shares.astype(np.float32))]
    soft = SoftTargets(**options)
    if "hard" in options:
        as_tensors = Tensor(ids.astype(np.int32)).realize(), Tensor(p.astype(np.float32)).realize()
        soft = soft._replace(ids=as_tensors[0], probabilities=as_tensors[1])
    with forms.forced(form):
        found = loss_and_gradients(*tensors, given[0], True, soft, given[1].realize())
        Tensor.realize(*found)
        each = token_losses(*tensors, given[0], soft).numpy()
    assert difference(each, reference(x @ weight.T, targets, *teacher, **options)) < 1e-5
    assert found[0].item() == pytest.approx(total(x, weight), rel=1e-5, abs=1e-5)
    assert difference(found[1].numpy(), by_differences(lambda a: total(a, weight), x)) < 1e-5
    assert difference(found[2].numpy(), by_differences(lambda a: total(x, a), weight)) < 1e-5


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_chunks_and_bfloat16_change_little(form, monkeypatch):
    x, weight, targets, ids, p, shares = numbers("all")
    arrays = [(a, np.float32) for a in (x, weight, shares, p)]
    x, weight, shares, p = (Tensor(a.astype(kind)).realize() for a, kind in arrays)
    targets, ids = (Tensor(a.astype(np.int32)).realize() for a in (targets, ids))
    soft = SoftTargets(**CASES["all"], ids=ids, probabilities=p)
    with forms.forced(form):
        whole = together(x, weight, targets, True, soft, shares)
        monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * V)
        parts = together(x, weight, targets, True, soft, shares)
        for found, expected in zip(parts, whole, strict=True):
            assert difference(found, expected) < 1e-5
        narrow_x = x.cast(dtypes.bfloat16).realize()
        narrow = together(narrow_x, weight, targets, True, soft, shares)
        for found, expected in zip(narrow, whole, strict=True):
            assert difference(found, expected) < 2e-2


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_without_anything_soft_it_is_cross_entropy(form):
    x, weight, targets, *_ = numbers("smoothed")
    tensors = [Tensor(a.astype(np.float32)).realize() for a in (x, weight)]
    tensors.append(Tensor(targets.astype(np.int32)).realize())
    with forms.forced(form):
        plain = together(*tensors, True)
        soft = together(*tensors, True, SoftTargets())
        for found, expected in zip(soft, plain, strict=True):
            assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_target_that_has_no_logit_is_nan(form):
    x, weight, targets, *_ = numbers("smoothed")
    targets[5] = V
    tensors = [Tensor(a.astype(np.float32)).realize() for a in (x, weight)]
    with forms.forced(form):
        losses = token_losses(*tensors, Tensor(targets.astype(np.int32)), SoftTargets(0.1)).numpy()
    assert np.isnan(losses).tolist() == [i == 5 for i in range(N)]
