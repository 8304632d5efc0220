"""Running a kernel inside a graph, and what its gradient is given."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.matmul import linear
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, with_gradient


def tensor(*shape, seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return Tensor(values).realize()


def swiglu_kernel(count, width):
    defines = {"N": count // width, "H": width, "ACT": TYPE_CODE[dtypes.float32]}
    return Kernel("swiglu_forward.c", defines)


def test_a_gradient_gets_outputs_and_inputs_in_the_shapes_they_were_passed():
    """Also what a kernel wrote in another shape, which is passed on without the reshape."""
    calls: list[Call] = []

    def gradient(dy, call):
        calls.append(call)
        (y,), (gate, up) = call.outputs, call.inputs
        return [dy * y, dy * up + gate]

    with forms.forced("cpu"):
        x, weight, up = tensor(6, 5), tensor(8, 5, seed=1), tensor(2, 3, 8, seed=2)
        gate = linear(x, weight).reshape(2, 3, 8)
        y = run(swiglu_kernel(48, 8), [empty(2, 3, 8, device="CPU")], [gate, up], gradient)[0]
        dx, dup = y.gradient(x, up, gradient=Tensor.full(y.shape, 2.0))
        assert [t.shape for t in (*calls[0].outputs, *calls[0].inputs)] == [(2, 3, 8)] * 3
        found = [t.numpy() for t in (y, dx, dup)]
    g, u = (x.numpy() @ weight.numpy().T).reshape(2, 3, 8), up.numpy()
    expected = g / (1 + np.exp(-g)) * u
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    dx = (2 * expected).reshape(6, 8) @ weight.numpy()
    np.testing.assert_allclose(found[1], dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], 2 * u + g, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_another_number_of_inputs_is_refused():
    with forms.forced("cpu"):
        gate, up = tensor(4, 8), tensor(4, 8, seed=1)
        y = run(
            swiglu_kernel(32, 8), [empty(4, 8, device="CPU")], [gate, up], lambda dy, call: [dy]
        )[0]
        with pytest.raises(ValueError, match="longer"):
            y.gradient(gate, gradient=Tensor.ones(4, 8))


def test_a_function_of_plain_tensors_may_have_a_gradient_of_its_own():
    def forward(x, y):
        return (x * y).sum(), x + y

    def gradient(dout, call):
        (_, total), (x, y) = call.outputs, call.inputs
        return [dout * total, (dout * x - y)]

    x, y = tensor(5), tensor(5, seed=1)
    product = with_gradient(forward, gradient)(x, y)[0]
    dx, dy = product.gradient(x, y, gradient=Tensor(3.0))
    assert product.item() == pytest.approx(float(x.numpy() @ y.numpy()), rel=1e-5)
    np.testing.assert_allclose(dx.numpy(), 3 * (x.numpy() + y.numpy()), rtol=1e-5)
    np.testing.assert_allclose(dy.numpy(), 3 * x.numpy() - y.numpy(), rtol=1e-5, atol=1e-6)


def test_a_kernels_name_and_text_depend_on_its_macros_and_not_on_its_sizes():
    small = Kernel("adamw.c", {"DECAY": 1}, {"COUNT": 7})
    large = Kernel("adamw.c", {"DECAY": 1}, {"COUNT": 700})
    assert small.name == large.name == "adamw_1"
    assert small.text() == large.text()
    assert Kernel("adamw.c", {"DECAY": 0}, {"COUNT": 7}).text() != small.text()
    assert Kernel("rms_norm_forward.c", {"EPS": "1e-05f"}).name == "rms_norm_forward_1e_05f"
