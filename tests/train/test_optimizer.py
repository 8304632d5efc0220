"""AdamW, clipping and the learning rate, against PyTorch's numbers and the formulas."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor

from tinyllama.config import LRScheduleConfig, TrainingConfig
from tinyllama.ops import forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.optimizer import AdamW, learning_rate

CONFIG = TrainingConfig(
    weight_decay=0.1, beta1=0.9, beta2=0.999, epsilon=1e-8, grad_clip=1.5, learning_rate=1e-3
)
# What the program in the docstring of `test_a_hundred_steps_equal_pytorch` prints, by step.
NORM = {1: 1.0846292227583525, 2: 1.5751234372801846, 100: 1.3985375937435882}
NORM |= {10: 1.8594916100069345}
WEIGHT = {
    1: [0.9989000000, 0.5392482757, -0.4171052217, -0.9888934974, -0.6525782566, 0.2846338192],
    2: [0.9978112944, 0.5393327598, -0.4165851566, -0.9891344851, -0.6515238688, 0.2855339198],
    10: [0.9959486929, 0.5396341666, -0.4161009672, -0.9880168293, -0.6510086211, 0.2928826726],
    100: [0.9895293553, 0.5346841866, -0.4123185196, -0.9790882707, -0.6444340440, 0.2931569592],
}
BIAS = {
    1: [1.0010000000, 1.0010000000, 1.0010000000],
    2: [1.0019524029, 1.0007885515, 1.0018641177],
    10: [1.0020045174, 1.0010975769, 1.0016441239],
    100: [0.9991230455, 1.0008259097, 1.0018729994],
}
WEIGHT_AVG = [-0.0489500369, -0.0768119821, -0.0256905168]
WEIGHT_AVG += [-0.0629681029, -0.0521780632, -0.1756508486]
WEIGHT_AVG_SQ = [0.0184153834, 0.0193477342, 0.0194796586]
WEIGHT_AVG_SQ += [0.0197785401, 0.0183182238, 0.0183958159]
BIAS_AVG = [-0.0000893202, -0.0011171826, -0.0023726307]
BIAS_AVG_SQ = [0.0193088153, 0.0191768909, 0.0188780094]


class Case:
    """A matrix and a vector with their optimizer."""

    def __init__(self, config, weight, bias):
        self.weight, self.bias = self.tensor(weight), self.tensor(bias)
        self.optimizer = AdamW({"w": self.weight, "b": self.bias}, config)

    @staticmethod
    def tensor(values):
        values = np.asarray(values, np.float32)
        tensor = Tensor.empty(*values.shape)
        write(tensor, values)
        return tensor

    def update(self, step, weight_grad, bias_grad, lr=1e-3, tokens=1):
        grads = {"w": self.tensor(weight_grad), "b": self.tensor(bias_grad)}
        numbers = self.tensor(self.optimizer.hyperparameters(step, lr, tokens))
        return float(self.optimizer.update(grads, numbers).item())

    def moment(self, name):
        return read(self.optimizer.state_dict()[name]).ravel()


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_hundred_steps_equal_pytorch(form):
    """The numbers above are PyTorch 2.13's, in float64:

    import torch
    torch.set_default_dtype(torch.float64)
    i = torch.arange(6.0)
    w = torch.nn.Parameter(torch.cos(i).reshape(2, 3))
    b = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for t in range(1, 101):
        w.grad = (1 + t % 7) / 4 * torch.sin(t * (i + 1)).reshape(2, 3)
        b.grad = (1 + t % 7) / 4 * torch.cos(t * (i[:3] + 2))
        norm = torch.nn.utils.clip_grad_norm_([w, b], 1.5)
        optimizer.step()
        if t in (1, 2, 10, 100):
            s = optimizer.state
            print(t, norm.item())
            for p in (w, b):
                print([p.tolist(), s[p]["exp_avg"].tolist(), s[p]["exp_avg_sq"].tolist()])

    Gradients come summed over 7 tokens here; some steps are clipped and some are not.
    """
    i = np.arange(6.0)
    with forms.forced(form):
        case = Case(CONFIG, np.cos(i).reshape(2, 3), np.ones(3))
        clipped = 0
        for t in range(1, 101):
            size = 7 * (1 + t % 7) / 4
            weight_grad = size * np.sin(t * (i + 1)).reshape(2, 3)
            norm = case.update(t, weight_grad, size * np.cos(t * (i[:3] + 2)), tokens=7)
            clipped += norm > CONFIG.grad_clip
            if t in WEIGHT:
                assert norm == pytest.approx(NORM[t], rel=1e-6)
                assert read(case.weight).ravel() == pytest.approx(WEIGHT[t], abs=1e-6)
                assert read(case.bias) == pytest.approx(BIAS[t], abs=1e-6)
    assert 0 < clipped < 100
    assert case.moment("exp_avg.w") == pytest.approx(WEIGHT_AVG, abs=1e-6)
    assert case.moment("exp_avg.b") == pytest.approx(BIAS_AVG, abs=1e-6)
    # The second moments' own scale is 1/50; 1 - 0.999 in float32 is off by 1.3e-5 of itself.
    assert case.moment("exp_avg_sq.w") == pytest.approx(WEIGHT_AVG_SQ, rel=2e-5)
    assert case.moment("exp_avg_sq.b") == pytest.approx(BIAS_AVG_SQ, rel=2e-5)


@pytest.mark.parametrize("form", ["cpu", "portable"])
@pytest.mark.parametrize(
    ("limit", "factor"), [(2.5, 0.5), (5.0, 1.0), (10.0, 1.0), (0.0, 1.0)], ids=str
)
def test_clipping_scales_every_gradient_by_one_factor(form, limit, factor):
    """The gradients have the norm 5: sqrt(9 + 16)."""
    config = TrainingConfig(grad_clip=limit, beta1=0.5, beta2=0.5)
    with forms.forced(form):
        case = Case(config, np.zeros((1, 2)), np.zeros(1))
        assert case.update(1, [[3.0, 0.0]], [-4.0]) == pytest.approx(5.0)
    assert case.moment("exp_avg.w") == pytest.approx([1.5 * factor, 0.0], rel=1e-6)
    assert case.moment("exp_avg.b") == pytest.approx([-2.0 * factor], rel=1e-6)
    assert case.moment("exp_avg_sq.w") == pytest.approx([4.5 * factor**2, 0.0], rel=1e-6)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_only_matrices_decay(form):
    config = TrainingConfig(weight_decay=0.25)
    with forms.forced(form):
        case = Case(config, [[1.0, -2.0]], [3.0])
        case.update(1, [[0.0, 0.0]], [0.0], lr=0.5)
    assert read(case.weight).tolist() == [[0.875, -1.75]]
    assert read(case.bias).tolist() == [3.0]


def test_state_is_float32_starts_at_zero_and_has_both_moments_of_every_parameter():
    state = Case(CONFIG, np.ones((2, 3)), np.ones(3)).optimizer.state_dict()
    assert {name: read(t).shape for name, t in state.items()} == {
        "exp_avg.w": (2, 3),
        "exp_avg.b": (3,),
        "exp_avg_sq.w": (2, 3),
        "exp_avg_sq.b": (3,),
    }
    assert all(read(t).dtype == np.float32 and not read(t).any() for t in state.values())


def schedule(kind, warmup, min_lr):
    return LRScheduleConfig(type=kind, warmup_steps=warmup, min_lr=min_lr)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_a_straight_line_from_zero_to_the_peak(kind):
    rates = [learning_rate(step, 100, 0.8, schedule(kind, 4, 0.1)) for step in range(1, 5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)


def test_cosine_goes_from_the_peak_to_min_lr_at_the_last_step():
    cosine = schedule("cosine", 10, 0.1)
    rate = lambda step: learning_rate(step, 110, 1.1, cosine)  # noqa: E731
    assert rate(10) == pytest.approx(1.1, rel=1e-12)
    assert rate(35) == pytest.approx(0.6 + 0.5 * math.sqrt(0.5), rel=1e-12)
    assert rate(60) == pytest.approx(0.6, rel=1e-12)
    assert rate(85) == pytest.approx(0.6 - 0.5 * math.sqrt(0.5), rel=1e-12)
    assert rate(109) > 0.1
    assert rate(110) == pytest.approx(0.1, rel=1e-12)
    assert rate(200) == pytest.approx(0.1, rel=1e-12)


def test_linear_goes_from_the_peak_to_min_lr_at_the_last_step():
    linear = schedule("linear", 10, 0.1)
    found = [learning_rate(step, 110, 1.1, linear) for step in (10, 35, 60, 85, 109, 110, 200)]
    assert found == pytest.approx([1.1, 0.85, 0.6, 0.35, 0.11, 0.1, 0.1], rel=1e-12)


def test_constant_stays_at_the_peak():
    constant = schedule("constant", 3, 0.1)
    assert {learning_rate(step, 50, 0.8, constant) for step in range(3, 60)} == {0.8}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(kind):
    assert learning_rate(1, 20, 0.8, schedule(kind, 0, 0.1)) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_schedule_that_is_shorter_than_its_warm_up_only_rises(kind):
    rates = [learning_rate(step, 3, 0.8, schedule(kind, 8, 0.1)) for step in (1, 2, 3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3], rel=1e-12)


@given(
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 100),
    peak=st.floats(1e-6, 1.0),
    share=st.just(0.0) | st.floats(1e-3, 1.0),
)
def test_rate_rises_to_the_peak_then_never_rises_and_stays_between(
    kind, total, warmup, peak, share
):
    config = schedule(kind, warmup, peak * share)
    rates = [learning_rate(step, total, peak, config) for step in range(1, total + 1)]
    tiny = 1e-12 * peak
    assert all(0 <= rate <= peak + tiny for rate in rates)
    assert all(rate > 0 for rate in rates[:-1])
    top = max(warmup, 1) - 1  # index of the first step at the peak
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    after = rates[top:]
    assert all(a >= b - tiny for a, b in itertools.pairwise(after))
    assert all(rate >= peak * share - tiny for rate in after)
    if len(after) > 1 and kind != "constant":
        assert after[-1] == pytest.approx(peak * share, abs=tiny)
