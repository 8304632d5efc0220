"""Runs on pairs of answers and with a teacher: they learn, resume bit for bit, and fit the plan."""

import json
import shutil

import numpy as np
import pytest
from lora_helpers import BASE, write_base
from objective_helpers import KINDS, run_config
from runs_helpers import cli, names, numbers

from tinyllama.config import config_from_toml
from tinyllama.errors import CheckpointError, ConfigError, DataError
from tinyllama.observe.anomalies import Limits
from tinyllama.train.manifest import write_manifest
from tinyllama.train.prepare import supported
from tinyllama.train.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["dpo", "orpo", "distill"])
def test_a_run_is_resumed_bit_for_bit(objective, kind, tmp_path, base):
    config = run_config(tmp_path, base, objective, kind)
    Trainer(config, show=False).run()
    whole = numbers(tmp_path / "run")
    assert len(whole) == 6 and all(np.isfinite(line["loss"]) for line in whole.values())
    other = f"checkpointing.checkpoint_dir={tmp_path / 'other'}"
    again = run_config(tmp_path, base, objective, kind, other)
    Trainer(again, resume=tmp_path / "run" / "step-00000002", show=False).run()
    resumed = numbers(tmp_path / "other")
    assert resumed == {step: line for step, line in whole.items() if step > 2}


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_begins_at_the_reference_and_learns_the_pairs(kind, tmp_path, base):
    config = run_config(tmp_path, base, "dpo", kind, "training.max_steps=12", "lora.dropout=0.0")
    if kind == "full":
        config = run_config(tmp_path, base, "dpo", kind, "training.max_steps=12")
    Trainer(config, show=False).run()
    lines = numbers(tmp_path / "run")
    assert lines[1]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(lines[1]["margin"]) < 1e-3
    assert lines[12]["loss"] < 0.6 and lines[12]["accuracy"] == 1.0
    assert lines[12]["margin"] > 0.1
    margin = lines[12]["reward_chosen"] - lines[12]["reward_rejected"]
    assert lines[12]["margin"] == pytest.approx(margin, abs=1e-4)
    assert {"val_loss", "val_accuracy", "val_margin"} <= lines[12].keys()
    assert lines[12]["val_loss"] < lines[3]["val_loss"]


def test_a_share_of_the_pairs_is_kept_for_validation(tmp_path, base):
    share = ["data.val_path=none", "data.val_fraction=0.4"]
    config = run_config(tmp_path, base, "dpo", "lora", *share, "training.max_steps=3")
    trainer = Trainer(config, show=False)
    trainer.run()
    assert trainer.batches.n_windows in range(3, 9)  # of nine
    lines = numbers(tmp_path / "run")
    assert {"val_loss", "val_accuracy", "val_margin"} <= lines[3].keys()


def test_a_pair_that_only_fills_the_batch_counts_nothing(tmp_path, base):
    """Nine pairs in batches of four: the third step of an epoch holds one."""
    config = run_config(tmp_path, base, "dpo", "full", "training.learning_rate=1e-30")
    Trainer(config, show=False).run()
    lines = numbers(tmp_path / "run")
    assert all(line["loss"] == pytest.approx(np.log(2), abs=1e-4) for line in lines.values())


def test_distillation_from_itself_has_no_soft_loss(tmp_path, base):
    overrides = ["distillation.alpha=0.0", f"distillation.top_k={BASE.vocab_size}"]
    config = run_config(tmp_path, base, "distill", "full", *overrides)
    Trainer(config, show=False).run()
    assert abs(numbers(tmp_path / "run")[1]["loss"]) < 1e-4


def test_what_was_computed_once_is_kept_and_made_again_if_damaged(tmp_path, base, capfd):
    config = run_config(tmp_path, base, "dpo", "full", "training.max_steps=2")
    first = Trainer(config, show=False)
    (file,) = (tmp_path / "cache").glob("*/reference.bin")
    known = first.batches.next().reference.copy()
    values = bytearray(file.read_bytes())
    values[3] ^= 1
    file.write_bytes(values)
    assert (Trainer(config, show=False).batches.next().reference == known).all()
    assert "reference.bin: damaged: its sum does not hold; it is computed again" in (
        capfd.readouterr().err
    )


def test_dpo_without_a_base_is_refused(tmp_path, base):
    text = '[training]\nobjective = "dpo"\n'
    with pytest.raises(ConfigError, match=r"training.objective: got \"dpo\", must come with"):
        supported(config_from_toml(text, "test.toml"))


def test_a_teacher_of_ours_with_a_flipped_bit_is_refused(tmp_path, base):
    teacher = tmp_path / "teacher"
    shutil.copytree(base, teacher)
    write_manifest(teacher, {})
    data = bytearray((teacher / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (teacher / "model.safetensors").write_bytes(data)
    set_teacher = f"distillation.teacher={teacher}"
    with pytest.raises(
        CheckpointError, match=r"distillation\.teacher: .*safetensors: changed: SHA"
    ):
        Trainer(run_config(tmp_path, base, "distill", "full", set_teacher), show=False)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, base):
    from export_helpers import write_model

    write_model(tmp_path / "teacher")
    set_teacher = f"distillation.teacher={tmp_path / 'teacher'}"
    with pytest.raises(ConfigError, match="must be a model of the same vocabulary"):
        Trainer(run_config(tmp_path, base, "distill", "full", set_teacher), show=False)


def test_early_stopping_ends_a_run_and_keeps_the_best(tmp_path, base):
    options = ["training.early_stopping=2", "training.eval_every=1", "training.max_steps=40"]
    options += ["training.learning_rate=0.3", "training.num_epochs=50"]
    config = run_config(tmp_path, base, "sft", "full", *options)
    outcome = Trainer(config, show=False).run()
    lines = numbers(tmp_path / "run")
    losses = [lines[step]["val_loss"] for step in lines]
    best = int(np.argmin(losses)) + 1
    assert outcome.finished and outcome.step == best + 2 < 40
    assert f"that of step {best}" in outcome.early
    assert {"best", "final"} <= set(names(tmp_path / "run"))
    state = json.loads((tmp_path / "run" / "best" / "training_state.json").read_text())
    assert state["best"] == {"step": best, "val_loss": min(losses), "since": 0}
    assert state["step"] == best
    again = Trainer(config, resume=tmp_path / "run" / "final", show=False).run()
    assert again.step == outcome.step and again.early == outcome.early
    code = cli("evaluate", "--model", tmp_path / "run" / "best", "--data", tmp_path / "text.txt")
    assert code == 0


def test_early_stopping_counts_on_over_a_resume(tmp_path, base):
    options = ["training.early_stopping=3", "training.eval_every=1", "training.max_steps=30"]
    options += ["training.learning_rate=0.3", "training.num_epochs=50"]
    options += ["checkpointing.save_every=1", "checkpointing.keep_last_n=99"]
    config = run_config(tmp_path, base, "sft", "full", *options)
    outcome = Trainer(config, show=False).run()
    one_before = tmp_path / "run" / f"step-{outcome.step - 1:08d}"
    again = Trainer(config, resume=one_before, show=False).run()
    assert (again.step, again.early) == (outcome.step, outcome.early)


def test_a_warm_up_as_a_share_of_the_steps(tmp_path, base):
    options = ["lr_schedule.warmup_ratio=0.5", "lr_schedule.type=wsd"]
    Trainer(run_config(tmp_path, base, "sft", "full", *options), show=False).run()
    rates = [line["lr"] for line in numbers(tmp_path / "run").values()]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[3:5] == pytest.approx([3e-3, 3e-3]) and rates[5] == pytest.approx(0, abs=1e-9)
    other = f"checkpointing.checkpoint_dir={tmp_path / 'other'}"
    again = run_config(tmp_path, base, "sft", "full", *options, other)
    trainer = Trainer(again, resume=tmp_path / "run" / "step-00000002", show=False)
    assert trainer.schedule.warmup_steps == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"chosen": "a"}', 'pairs have "chosen" and "rejected" in each row'),
        ('{"chosen": "a", "rejected": 3}', 'line 1: "chosen" and "rejected" must both be'),
        ("{", 'pairs have "chosen" and "rejected" in each row'),
        ("[1]", 'pairs have "chosen" and "rejected" in each row'),
        ('{"chosen": "a", "rejected": "a"}', "1 pairs left out: both answers are the same"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row, message, tmp_path, base):
    config = run_config(tmp_path, base, "dpo")
    (tmp_path / "pairs.jsonl").write_text(f"{row}\n")
    with pytest.raises(DataError, match=message):
        Trainer(config, show=False)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_guarded_step_of_pairs_makes_the_same_updates(objective, tmp_path, base):
    """As one that is not guarded, where nothing is unusual; the loss comes with its measures."""
    for action in ("note", "skip"):
        folder = f"checkpointing.checkpoint_dir={tmp_path / action}"
        more = (f"observe.on_anomaly={action}", folder)
        Trainer(run_config(tmp_path, base, objective, "full", *more), show=False).run()
    assert numbers(tmp_path / "skip") == numbers(tmp_path / "note")


@pytest.mark.parametrize(("limit", "is_applied"), [(0.6, False), (0.8, True)])
def test_the_limit_of_a_loss_is_one_of_pairs(limit, is_applied, tmp_path, base):
    """The first loss of DPO is ln 2 = 0.69 for each pair, of many tokens."""
    config = run_config(tmp_path, base, "dpo", "full", "observe.on_anomaly=skip")
    made = Trainer(config, show=False)
    rows = made.batches.next()
    parts = [type(rows)(*(array[i : i + 4] for array in rows)) for i in (0, 4)]
    result = made.train_step(parts, 1, 1e-3, Limits(loss=limit))
    assert result.loss == pytest.approx(np.log(2), abs=1e-4)
    assert result.applied is is_applied
