"""NEFTune's noise: its size, its key, and that only training has it."""

import numpy as np
import pytest
from lora_helpers import write_base
from model_helpers import GROUPED, build, on_device, random_batch
from objective_helpers import run_config
from runs_helpers import numbers
from tinygrad import Tensor, dtypes

from tinyllama.config import Config, TrainingConfig
from tinyllama.model.build import build_blank
from tinyllama.model.noise import EmbeddingNoise, noising
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.memory_estimate import model_parameters
from tinyllama.train.trainer import Trainer

SHAPE = (2, 16, 24)


def noise_of(seed, step, micro_batch, dtype=dtypes.float32):
    noise = EmbeddingNoise(5.0)
    noise.set_key(seed, step, micro_batch)
    nothing = Tensor.zeros(*SHAPE, dtype=dtype).contiguous().realize()
    return noise(nothing, noise.noise_key).float().numpy()


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.bfloat16])
def test_noise_is_uniform_within_its_bound(dtype):
    found = noise_of(0, 1, 0, dtype) / (5.0 / np.sqrt(16 * 24))
    assert np.abs(found).max() < 1.004 and np.abs(found).max() > 0.97
    assert found.mean() == pytest.approx(0, abs=0.06)
    assert found.std() == pytest.approx(np.sqrt(1 / 3), rel=0.05)


def test_noise_is_a_function_of_seed_step_and_micro_batch():
    first = noise_of(3, 7, 1)
    assert (noise_of(3, 7, 1) == first).all()
    for other in ((4, 7, 1), (3, 8, 1), (3, 7, 0)):
        assert (noise_of(*other) != first).mean() > 0.99


def test_only_training_has_noise():
    model, batch = build(GROUPED), on_device(random_batch(GROUPED))
    plain = StagedLoss(model).loss(*batch).item()
    model.noise = EmbeddingNoise(20.0)
    staged = StagedLoss(model, model.state_dict())
    assert StagedLoss(model).loss(*batch).item() == plain
    with noising(model.noise, 0, lambda *_: model.noise.on())(1, 0):
        noisy, grads = staged.gradients(*batch)
    assert abs(noisy.item() - plain) > 1e-3 * plain
    assert grads.keys() == model.state_dict().keys()
    assert StagedLoss(model).loss(*batch).item() == plain


def test_the_key_is_no_weight():
    config = Config(model=GROUPED, training=TrainingConfig(neftune_alpha=5.0))
    built = build_blank(config)
    assert built.model.noise is not None
    assert not any("noise" in name for name in (*built.trained, *built.model.state_dict()))
    assert model_parameters(config) == model_parameters(Config(model=GROUPED))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_with_noise_is_resumed_bit_for_bit(kind, tmp_path):
    base = write_base(tmp_path / "base")
    option = "training.neftune_alpha=5.0"
    Trainer(run_config(tmp_path, base, "sft", kind, option), show=False).run()
    whole = numbers(tmp_path / "run")
    other = f"checkpointing.checkpoint_dir={tmp_path / 'other'}"
    resumed = run_config(tmp_path, base, "sft", kind, option, other)
    Trainer(resumed, resume=tmp_path / "run" / "step-00000002", show=False).run()
    assert numbers(tmp_path / "other") == {s: line for s, line in whole.items() if s > 2}
    plain = f"checkpointing.checkpoint_dir={tmp_path / 'plain'}"
    Trainer(run_config(tmp_path, base, "sft", kind, plain), show=False).run()
    assert numbers(tmp_path / "plain")[1]["loss"] != whole[1]["loss"]
