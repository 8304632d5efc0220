"""Copies of the weights in training: written by the optimizer, read by products, never seen."""

import numpy as np
import pytest
from model_helpers import LENGTH, ROWS, SQUARE, TIED, build, random_batch, random_weights
from tinygrad import Tensor, dtypes

from tinyllama.config import Config, DataConfig, TrainingConfig
from tinyllama.ops import forms
from tinyllama.runtime import c_kernel
from tinyllama.runtime.storage import read, write
from tinyllama.system import memory
from tinyllama.train.memory_estimate import blank_step, estimate_memory
from tinyllama.train.micro_batch import plan_run
from tinyllama.train.optimizer import AdamW, weights_to_copy
from tinyllama.train.step import TrainStep

TRAINING = TrainingConfig(grad_clip=0.5, weight_decay=0.1, dtype="bfloat16")
FORMS = ["portable", "cpu"]


def trained(config, form, copied, steps=3, micro_batches=1):
    """Weights, moments, losses and norms after some steps, and the copies."""
    with forms.forced(form):
        model = build(config, dtype=dtypes.bfloat16)
        names = model.multiplied() if copied else []
        optimizer = AdamW(model.state_dict(), TRAINING, copied=names)
        step = TrainStep(model, optimizer, micro_batches)
        results = [
            step([random_batch(config, seed=7 * n + k) for k in range(micro_batches)], n, 0.01)
            for n in range(1, steps + 1)
        ]
    tensors = model.state_dict() | optimizer.state_dict()
    state = {name: read(t).tobytes() for name, t in tensors.items()}
    return state, [(r.loss, r.grad_norm) for r in results], model, optimizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("config", "micro_batches"), [(SQUARE, 1), (SQUARE, 2), (TIED, 1)])
def test_a_step_with_copies_has_the_same_bits(form, config, micro_batches):
    plain = trained(config, form, copied=False, micro_batches=micro_batches)
    copied = trained(config, form, copied=True, micro_batches=micro_batches)
    assert plain[:2] == copied[:2]


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_keeps_copies_up_to_date(form):
    _, _, model, optimizer = trained(SQUARE, form, copied=True)
    weights = model.state_dict()
    assert set(optimizer.copies) == {n for n in weights if "norm" not in n and "embed" not in n}
    before = random_weights(SQUARE)
    for name, copy in optimizer.copies.items():
        values = read(weights[name])
        assert (values != before[name]).any()
        bits = values.view(np.uint32)
        assert (read(copy) == (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).all()


def test_a_tied_embedding_is_multiplied_too():
    assert "model.embed_tokens.weight" in build(TIED).multiplied()
    assert "model.embed_tokens.weight" not in build(SQUARE).multiplied()


def test_an_update_that_is_left_out_leaves_the_copies():
    _, _, model, optimizer = trained(SQUARE, "cpu", copied=True)
    before = {name: read(copy).copy() for name, copy in optimizer.copies.items()}
    weights = {name: read(t).copy() for name, t in model.state_dict().items()}
    gradients = {name: Tensor(values).realize() for name, values in weights.items()}
    numbers = optimizer.hyperparameters(4, 0.01, 1)
    numbers[-1] = 0  # grad_scale
    with forms.forced("cpu"):
        optimizer.update(gradients, Tensor(numbers).realize()).realize()
    assert all((read(copy) == before[name]).all() for name, copy in optimizer.copies.items())
    assert all((read(t) == weights[name]).all() for name, t in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_others_wrote_are_copied_again(form):
    """As after going back to a checkpoint."""
    batch = random_batch(SQUARE, rows=ROWS, length=LENGTH)
    losses = []
    for copied in (False, True):
        with forms.forced(form):
            model = build(SQUARE, dtype=dtypes.bfloat16)
            names = model.multiplied() if copied else []
            step = TrainStep(model, AdamW(model.state_dict(), TRAINING, copied=names), 1)
            step([batch], 1, 0.01)
            for name, values in random_weights(SQUARE, seed=5).items():
                write(model.state_dict()[name], values)
            step.weights_were_written = True
            losses.append(step([batch], 2, 0.01).loss)
    assert losses[0] == losses[1]


def test_copies_are_neither_weights_nor_saved():
    _, _, model, optimizer = trained(SQUARE, "cpu", copied=True)
    assert set(model.state_dict()) == set(random_weights(SQUARE))
    assert len(optimizer.state_dict()) == 2 * len(optimizer.parameters)


def config(**training):
    data = DataConfig(context_length=32, val_path=None)
    t = TrainingConfig(**{"batch_size": 2, "dtype": "bfloat16", **training})
    return Config(model=SQUARE, training=t, data=data)


@pytest.fixture
def paying(monkeypatch):
    """Copies pay, as on a processor that multiplies bfloat16."""
    monkeypatch.setattr("tinyllama.train.optimizer.pay", lambda weight, dtype: True)
    monkeypatch.setattr("tinyllama.train.memory_estimate._runtime_bytes", lambda _: 50_000_000)


def test_the_estimate_counts_two_bytes_per_copied_weight(paying):
    asked = config()
    found, plain = (estimate_memory(asked, copies=c) for c in (True, False))
    multiplied = found.weights // 4 - SQUARE.vocab_size * SQUARE.hidden_size
    multiplied -= (2 * SQUARE.num_layers + 1) * SQUARE.hidden_size  # the norms
    assert (found.copies, plain.copies) == (2 * multiplied, 0)
    # Where the processor reads them no other tensor changes; the portable form narrows less.
    assert found.total <= plain.total + found.copies
    assert found.as_dict()["copies"] == found.copies
    assert "copies of weights in 16 bits" in found.table()
    assert "copies" not in plain.table()


def test_copies_are_taken_only_where_they_fit(paying, monkeypatch):
    asked = config()
    found, plain = (estimate_memory(asked, copies=c) for c in (True, False))
    assert plain.total < found.total
    for free, taken in ((found.total, True), (found.total - 1, False), (plain.total, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        assert bool(plan_run(asked).step.optimizer.copies) == taken
    monkeypatch.setattr(memory, "free_bytes", lambda: plain.total - 1)
    assert not plan_run(asked, force=True).step.optimizer.copies
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    assert not plan_run(asked).step.optimizer.copies


def test_copies_cost_no_micro_batch(paying, monkeypatch):
    asked = config(batch_size=8)
    plain = estimate_memory(asked, copies=False).total
    monkeypatch.setattr(memory, "free_bytes", lambda: plain)
    found = plan_run(asked)
    assert found.config.training.micro_batch == 8
    assert not found.step.optimizer.copies


def test_copies_pay_on_a_gpu_and_in_amx():
    narrow = build(SQUARE, dtype=dtypes.bfloat16)
    for form, dtype, pays in (
        ("cpu", "bfloat16", c_kernel.has_amx()),
        ("cpu", "float32", False),
        ("portable", "bfloat16", False),
        ("gpu", "bfloat16", True),
        ("gpu", "float16", True),
        ("gpu", "float32", False),
    ):
        narrow.dtype = getattr(dtypes, dtype)
        with forms.forced(form):
            names = weights_to_copy(narrow, narrow.state_dict())
        assert names == (narrow.multiplied() if pays else []), (form, dtype)
        with forms.forced(form):
            assert weights_to_copy(narrow, {}) == []  # adapters alone are trained


def test_a_planned_step_has_the_copies_of_the_run(paying):
    asked = config()
    assert set(blank_step(asked).optimizer.copies) == set(build(SQUARE).multiplied())
    assert not blank_step(asked, copies=False).optimizer.copies
