"""One optimizer step: gradients summed over micro-batches, divided once, applied once."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import (
    LENGTH,
    ROWS,
    SQUARE,
    build,
    difference,
    on_device,
    random_batch,
    random_weights,
)
from tinygrad import GlobalCounters, Tensor
from tinygrad.engine import realize
from tinygrad.uop.ops import Ops

from tinyllama.config import LlamaConfig, TrainingConfig
from tinyllama.data.batches import Batch
from tinyllama.runtime.capture import captured
from tinyllama.runtime.storage import Inputs, read
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

TRAINING = TrainingConfig(grad_clip=0.5, weight_decay=0.1, epsilon=1e-3)


class Run:
    """A model under training, and what its steps returned."""

    def __init__(self, config=SQUARE, micro_batches=1):
        self.model = build(config)
        self.optimizer = AdamW(self.model.state_dict(), TRAINING)
        self.step = TrainStep(self.model, self.optimizer, micro_batches)
        self.results = []

    def train(self, *steps, lr=0.01):
        """steps: lists of micro-batches."""
        for batches in steps:
            self.results.append(self.step(batches, len(self.results) + 1, lr))
        return self

    def state(self):
        """Weights and optimizer state, by name."""
        tensors = self.model.state_dict() | self.optimizer.state_dict()
        return {name: read(tensor).copy() for name, tensor in tensors.items()}


def uneven(rows, seed=0):
    """A batch of which each row trains fewer tokens than the one before, the last one none."""
    batch = random_batch(SQUARE, rows, seed=seed)
    for row in range(rows):
        batch.targets[row, : (row + 1) * LENGTH // rows] = -1
    return batch


def split(batch, parts):
    return [Batch(*arrays) for arrays in zip(*(np.split(a, parts) for a in batch), strict=True)]


@pytest.mark.parametrize("make", [uneven, lambda rows, seed: random_batch(SQUARE, rows, seed=seed)])
def test_accumulation_equals_the_big_batch(make):
    batches = [make(ROWS, seed=seed) for seed in range(3)]
    whole = Run().train(*([b] for b in batches))
    parts = Run(micro_batches=ROWS).train(*(split(b, ROWS) for b in batches))
    for a, b in zip(whole.results, parts.results, strict=True):
        assert a.tokens == b.tokens
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-6)
    expected = whole.state()
    for name, found in parts.state().items():
        # Moments are gradients and their squares, in which a rounding shows undiluted.
        assert difference(found, expected[name]) < (5e-6 if "exp_avg" in name else 1e-6), name


def test_a_micro_batch_without_any_target_changes_nothing():
    batch = random_batch(SQUARE)
    blank = Batch(batch.tokens, np.full_like(batch.targets, -1), batch.starts)
    alone = Run().train([batch], [batch])
    beside = Run(micro_batches=2).train([batch, blank], [blank, batch])
    assert [r.tokens for r in beside.results] == [r.tokens for r in alone.results]
    for a, b in zip(alone.results, beside.results, strict=True):
        assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=1e-6)
    expected = alone.state()
    for name, found in beside.state().items():
        assert difference(found, expected[name]) < (5e-6 if "exp_avg" in name else 1e-6), name


def test_a_batch_without_any_target_has_no_loss_and_no_gradient():
    run = Run()
    batch = random_batch(SQUARE)
    run.train([Batch(batch.tokens, np.full_like(batch.targets, -1), batch.starts)])
    assert run.results == [(0.0, 0.0, 0, {}, True)]
    for name, value in random_weights(SQUARE).items():
        found = run.state()[name]
        decayed = value * (1 - 0.01 * 0.1) if value.ndim == 2 else value
        assert difference(found, decayed) < 1e-6, name


def test_loss_and_norm_are_means_over_the_trained_tokens():
    batch = uneven(ROWS)
    run = Run().train([batch])
    model = build(SQUARE)
    summed, grads = StagedLoss(model, model.state_dict()).gradients(*on_device(batch))
    tokens = int((batch.targets >= 0).sum())
    assert 0 < tokens < batch.targets.size / 2
    norm = np.sqrt(sum((read(g).astype(np.float64) ** 2).sum() for g in grads.values()))
    assert run.results[0].tokens == tokens
    assert run.results[0].loss == pytest.approx(float(summed.item()) / tokens, rel=1e-6)
    assert run.results[0].grad_norm == pytest.approx(norm / tokens, rel=1e-6)


def test_two_runs_are_bit_equal():
    batches = [random_batch(SQUARE, seed=seed) for seed in range(3)]
    first, second = (Run().train(*([b] for b in batches)) for _ in range(2))
    assert first.results == second.results
    expected = second.state()
    for name, found in first.state().items():
        assert found.tobytes() == expected[name].tobytes(), name


def test_a_tied_model_trains_one_matrix():
    config = replace(SQUARE, tie_word_embeddings=True)
    run = Run(config).train([random_batch(config)])
    assert "lm_head.weight" not in run.state()
    before = random_weights(config)["model.embed_tokens.weight"]
    assert (run.state()["model.embed_tokens.weight"] != before).all()


def test_training_on_one_batch_learns_it():
    batch = [random_batch(SQUARE)]
    losses = [r.loss for r in Run().train(*[batch] * 60).results]
    assert losses[-1] < 0.5 * losses[0]
    assert min(losses) == pytest.approx(losses[-1], rel=0.1)


@contextmanager
def compilations():
    """Collects how many kernels tinygrad compiles, or finds compiled, at a time."""
    found, compile_linear = [], realize.compile_linear

    def spy(linear, *args, **kwargs):
        found.append(sum(call.src[0].op in (Ops.SINK, Ops.PROGRAM) for call in linear.src))
        return compile_linear(linear, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinygrad.engine.jit.compile_linear", spy)
        patch.setattr("tinygrad.engine.realize.compile_linear", spy)
        yield found


def test_nothing_is_compiled_or_scheduled_after_the_first_step(monkeypatch):
    scheduled, schedule = [], Tensor.linear_with_vars

    def schedule_spy(*tensors):
        scheduled.extend(t.shape for t in tensors)
        return schedule(*tensors)

    monkeypatch.setattr(Tensor, "linear_with_vars", schedule_spy)
    for micro_batches in (1, 2):
        run, batches = Run(micro_batches=micro_batches), [random_batch(SQUARE)] * micro_batches
        with compilations() as compiled:
            run.train(batches)
            assert sum(compiled) > 60 and len(scheduled) > 20
            compiled.clear()
            for _ in range(2):
                scheduled.clear()
                run.train(batches)
                assert (scheduled, compiled) == ([], [])


def kernels(layers):
    """Kernels of a captured step of a model with so many layers."""
    with compilations() as compiled:
        Run(replace(SQUARE, num_layers=layers)).train([random_batch(SQUARE)])
    return max(compiled)


def test_kernels_of_a_step_are_few_and_the_same_for_each_layer():
    one, two, four = (kernels(layers) for layers in (1, 2, 4))
    assert four - two == 2 * (two - one)
    # 7 products with 2 gradients each, and the norm and the update of 9 weights, are 39.
    assert 39 <= two - one <= 65
    assert one < 100


def test_operations_executed_are_those_of_the_model():
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=256
    )
    rows, length = 4, 128
    run = Run(config).train([random_batch(config, rows, length)])
    GlobalCounters.reset()
    run.train([random_batch(config, rows, length)])
    products = 4 * (4 + 3) * 256 * 256 + 256 * 256
    # 6 per weight and token; attention 12 T h, of which causality needs half.
    model = rows * length * (6 * products + 6 * 4 * 256 * length)
    assert 1.0 <= GlobalCounters.global_ops / model <= 1.10


def test_inputs_are_the_same_tensors_with_new_numbers():
    inputs, tripled = Inputs(), captured(lambda a, b: (a * 3 + b).contiguous().realize())
    seen = []
    for n in range(4):
        a, b = np.full((2, 3), n, np.float32), np.full(3, 10 * n, np.float32)
        x, y = inputs(a, b)
        seen.append((x, y))
        result = tripled(x, y)
        # The step above may still wait in the queue: it must run before its inputs change.
        inputs(a + 100, b)
        assert result.tolist() == (a * 3 + b).tolist()
    assert all(x is seen[0][0] and y is seen[0][1] for x, y in seen)
    same_shape = inputs(np.ones(2, np.int32), np.zeros(2, np.int32))
    assert [t.tolist() for t in same_shape] == [[1, 1], [0, 0]]
