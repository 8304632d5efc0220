"""AdamW and clipping, against PyTorch's numbers and the formulas."""

import numpy as np
import pytest
from tinygrad import Tensor

from tinyllama.config import TrainingConfig
from tinyllama.ops import forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.optimizer import AdamW

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
