"""A piece that is scheduled once and run for other tensors, alone and in a captured step."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.adamw import Parameter, adamw
from tinyllama.ops.matmul import linear
from tinyllama.runtime.capture import captured
from tinyllama.runtime.stage import (
    Stage,
    recomputed,
    replaced,
    saved_for_backward,
)


def tensor(*values, dtype=dtypes.float32):
    return Tensor(list(values), dtype=dtype).contiguous().realize()


class Counted:
    """A stage of 2 a + b that counts how often it is built."""

    def __init__(self):
        self.stage, self.builds = Stage(), 0

    def __call__(self, a, b, key=None, factor=2):
        def build():
            self.builds += 1
            return [(a * factor + b).contiguous(), (a * b).contiguous()]

        return [t.tolist() for t in self.stage([a, b], build, key)]


def test_other_tensors_get_their_own_results_from_one_schedule():
    piece = Counted()
    assert piece(tensor(1, 2, 3), tensor(10, 20, 30)) == [[12, 24, 36], [10, 40, 90]]
    assert piece(tensor(4, 5, 6), tensor(0, 1, 2)) == [[8, 11, 14], [0, 5, 12]]
    assert piece.builds == 1


def test_earlier_results_are_not_overwritten():
    stage = Stage()
    outs = []
    for value in (1, 2, 3):
        a = tensor(value, value)
        outs += stage([a], lambda a=a: [(a * 10).contiguous()])
    assert [t.tolist() for t in outs] == [[10, 10], [20, 20], [30, 30]]


def test_each_shape_type_and_key_has_a_schedule_of_its_own():
    piece = Counted()
    assert piece(tensor(1, 2), tensor(1, 1)) == [[3, 5], [1, 2]]
    assert piece(tensor(1, 2, 3), tensor(1, 1, 1)) == [[3, 5, 7], [1, 2, 3]]
    ints = tensor(7, 8, dtype=dtypes.int32), tensor(1, 1, dtype=dtypes.int32)
    assert piece(*ints) == [[15, 17], [7, 8]]
    assert piece(tensor(1, 2), tensor(1, 1), key="three", factor=3) == [[4, 7], [1, 2]]
    assert piece.builds == 4
    assert piece(tensor(5, 6), tensor(1, 1)) == [[11, 13], [5, 6]]
    assert piece(tensor(5, 6), tensor(1, 1), key="three", factor=3) == [[16, 19], [5, 6]]
    assert piece.builds == 4


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_updates_in_place_reach_the_tensor_of_the_call(form):
    scalars = tensor(0.5, 0.0, 0.0, 1e-8, 0.0, 1.0, 1.0, 1.0)
    stage = Stage()
    states = [[tensor(*[value] * 4) for value in (p, 0.0, 0.0)] for p in (1.0, 10.0, 100.0)]
    grads = [tensor(1, -1, 2, -2), tensor(3, 3, -3, -3), tensor(-5, -5, -5, 5)]
    with forms.forced(form):
        for state, grad in zip(states, grads, strict=True):

            def build(state=state, grad=grad):
                return adamw([Parameter(*state, grad, False)], scalars)

            updated = stage([*state, grad, scalars], build)
            assert updated[0].tolist() == state[0].tolist()
    # Without momentum the update is lr times the sign of the gradient.
    assert states[0][0].tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])
    assert states[1][0].tolist() == pytest.approx([9.5, 9.5, 10.5, 10.5])
    assert states[2][0].tolist() == pytest.approx([100.5, 100.5, 100.5, 99.5])
    assert states[2][1].tolist() == [-5, -5, -5, 5]


def test_the_same_tensor_twice_is_refused_at_every_call():
    piece, a = Counted(), tensor(1, 2)
    with pytest.raises(AssertionError, match="a stage got the same tensor twice"):
        piece(a, a)
    piece(a, tensor(3, 4))
    with pytest.raises(AssertionError, match="a stage got the same tensor twice"):
        piece(a, a)


def test_a_tensor_that_is_not_a_whole_buffer_is_refused():
    with pytest.raises(AssertionError, match="a stage works on whole buffers"):
        Counted()(tensor(1, 2) + 1, tensor(1, 2))


def test_pieces_of_a_captured_step_run_again_with_new_inputs():
    """The second piece reads what the first wrote; nothing is built at the second call."""
    stage, builds = Stage(), []

    def piece(a, b):
        def build():
            builds.append(1)
            return [(a * 2 + b).contiguous()]

        return stage([a, b], build)[0]

    weights = [tensor(1, 1), tensor(2, 3), tensor(5, 5)]

    @captured
    def step(x):
        for weight in weights:
            x = piece(x, weight)
        return x

    for x in (np.array([1, 2]), np.array([3, 4]), np.array([-1, 0])):
        expected = x
        for weight in ([1, 1], [2, 3], [5, 5]):
            expected = expected * 2 + np.array(weight)
        assert step(tensor(*x.tolist())).tolist() == expected.tolist()
    assert len(builds) == 1


def test_what_a_computation_writes_can_be_read_instead_of_computed_again():
    with forms.forced("cpu"):
        x, w = tensor(1, 2, 3, 4).reshape(2, 2), tensor(1, 0, 0, 2).reshape(2, 2)
        x, w = x.contiguous().realize(), w.contiguous().realize()
        inner = linear(x, w)
        out = (inner * inner).contiguous()
        saved = saved_for_backward(out, [x, w])
        assert [t.shape for t in saved if t.shape == (2, 2)]
        stand_ins = [Tensor.full(t.shape, 3.0).contiguous().realize() for t in saved]
        assert replaced([out], saved, stand_ins)[0].tolist() == [[9, 9], [9, 9]]
        assert out.tolist() == [[1, 16], [9, 64]]


def test_a_tensor_marked_as_recomputed_is_computed_again_for_the_gradient():
    x, w = tensor(1, 2, 3, 4).reshape(2, 2), tensor(1, 0, 0, 2).reshape(2, 2)
    kept = (x @ w).contiguous()
    out = (recomputed((kept * 2).contiguous()) * 3).contiguous()
    assert [t.uop for t in saved_for_backward(out, [x, w])] == [kept.uop]
    assert replaced([out], [kept], [tensor(1, 1, 1, 1).reshape(2, 2)])[0].tolist() == [[6, 6]] * 2
