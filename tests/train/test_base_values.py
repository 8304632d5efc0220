"""Values of a base that a run may override: they act wherever the model computes, and are said."""

from dataclasses import replace

import numpy as np
import pytest
from lora_helpers import BASE, run_config, write_base, write_text
from model_helpers import difference, random_batch, random_weights, reference_logits, reference_loss
from runs_helpers import cli
from tinygrad import Tensor

from tinyllama.errors import ConfigError
from tinyllama.formats.huggingface import open_folder
from tinyllama.generate.generator import Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.model.build import load_model
from tinyllama.observe.metrics import read_metrics
from tinyllama.train.prepare import with_base
from tinyllama.train.trainer import Trainer

OTHER = {"max_seq_len": 32, "rope_theta": 50.0, "rms_norm_eps": 0.5}
OVERRIDES = [f"model.{key}={value}" for key, value in OTHER.items()]
SIZES = replace(BASE, **OTHER)


@pytest.fixture
def base(tmp_path):
    write_text(tmp_path)
    return write_base(tmp_path / "base")


def configuration(folder, base, *overrides):
    """A run of one step that hardly moves a weight, validated on the text it trains on."""
    still = ["training.learning_rate=1e-12", "training.max_steps=1", "training.weight_decay=0"]
    where = f"data.val_path={folder}/val.txt"
    (folder / "val.txt").write_bytes((folder / "train.txt").read_bytes()[:2000])
    return replace(run_config(folder, base, *still, where, *overrides), lora=None)


def test_overridden_values_act_in_training_validation_generation_and_what_is_saved(base, tmp_path):
    config = with_base(configuration(tmp_path, base, *OVERRIDES))
    weights, trainer = random_weights(BASE), Trainer(config, show=False)
    batch = Trainer(config, show=False).batches.next()
    validation = reference_validation(trainer, weights)
    final = trainer.run().checkpoint
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = (batch.targets >= 0).sum()
    assert line["loss"] == pytest.approx(reference_loss(weights, SIZES, batch) / trained, rel=1e-5)
    assert line["val_loss"] == pytest.approx(validation, rel=1e-5)
    saved = open_folder(final).config
    assert {key: getattr(saved, key) for key in OTHER} == OTHER
    tokens = random_batch(BASE, length=20).tokens
    expected = reference_logits(weights, SIZES, tokens)
    assert difference(reference_logits(weights, BASE, tokens), expected) > 0.05
    model = load_model(final)
    for found in (trainer.model, model):
        assert difference(found(Tensor(tokens).realize()).numpy(), expected) < 1e-4
    prompt = tokens[0].tolist()
    (drawn,) = Generator(model).tokens(prompt, 1, Sampling(temperature=0))
    assert drawn == expected[0, -1].argmax()


def reference_validation(trainer, weights):
    """The mean loss of the validation text by the formula."""
    from tinyllama.data.batches import sequential

    found = trained = 0
    for batch in sequential(trainer.evaluator.dataset, 32, 2):
        found += reference_loss(weights, SIZES, batch)
        trained += (batch.targets >= 0).sum()
    return found / trained


def test_one_line_says_each_overridden_value_with_both_before_anything_is_planned(
    base, tmp_path, capsys, monkeypatch
):
    config = configuration(tmp_path, base, *OVERRIDES[1:])
    lines = []
    with_base(config, lines.append)
    source = f"{base}/config.json"
    assert lines == [
        f"--set model.rope_theta=50.0: 50.0 is used instead of 10000.0, which {source} has",
        f"--set model.rms_norm_eps=0.5: 0.5 is used instead of 1e-05, which {source} has",
    ]

    def planning(config, **options):
        assert "instead of 10000.0" in capsys.readouterr().err
        raise ConfigError("planned")

    monkeypatch.setattr("tinyllama.train.micro_batch.plan_run", planning)
    (tmp_path / "run.toml").write_text(with_base(config).to_toml())
    assert cli("train", tmp_path / "run.toml", "--quiet") == 2
    assert capsys.readouterr().err == "planned\n"


def test_a_base_whose_values_are_kept_is_not_mentioned(base, tmp_path):
    lines = []
    with_base(configuration(tmp_path, base), lines.append)
    with_base(configuration(tmp_path, base, "model.rope_theta=10000"), lines.append)
    assert lines == []


def test_a_resumed_run_must_have_the_values_of_its_checkpoint(base, tmp_path):
    config = with_base(configuration(tmp_path, base, *OVERRIDES))
    final = Trainer(config, show=False).run().checkpoint
    assert np.isclose(Trainer(config, resume=final, show=False).model.config.rms_norm_eps, 0.5)
    other = with_base(configuration(tmp_path, base, "model.max_seq_len=32"))
    with pytest.raises(ConfigError, match=r"model.rms_norm_eps: got 1e-05, must be 0.5 as in"):
        Trainer(other, resume=final, show=False)
