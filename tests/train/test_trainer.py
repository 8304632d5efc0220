"""A whole run on real text: metrics, checkpoints, validation, the time budget, and how it stops."""

import errno
import math
import os
import re
import time

import numpy as np
import pytest
from model_helpers import on_device
from runs_helpers import (
    VAL_FILES,
    cli,
    config_file,
    configuration,
    finished_run,
    left_behind,
    metrics,
    names,
    steps_per_epoch,
    tokenizer,
    train,
    trainer,
)

from tinyllama.cli.arguments import exit_code
from tinyllama.config import load_config
from tinyllama.data.batches import Batches, prepare
from tinyllama.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenizerError,
    TrainingError,
)
from tinyllama.formats.safetensors import SafetensorsFile
from tinyllama.model.llama import Llama
from tinyllama.runtime.storage import read, write
from tinyllama.system.files import held
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.train.checkpoint import read_state, verify
from tinyllama.train.prepare import check_fresh
from tinyllama.train.run_folder import held_alone
from tinyllama.train.schedule import learning_rate

KEYS = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "epoch"}


def test_a_run_writes_one_line_of_metrics_a_step_with_the_documented_keys():
    lines, epoch = metrics(finished_run()), steps_per_epoch()
    assert list(lines) == list(range(1, 2 * epoch + 1))
    for step, line in lines.items():
        measured = {"val_loss"} if step in (epoch, 2 * epoch) else set()
        assert set(line) == KEYS | measured
        assert line["epoch"] == (1 if step <= epoch else 2)
        assert line["memory_bytes"] > 1e6
        assert all(math.isfinite(value) and value > 0 for value in line.values())


def test_a_run_learns_its_text():
    lines, epoch = metrics(finished_run()), steps_per_epoch()
    assert lines[1]["loss"] == pytest.approx(math.log(400), rel=0.02)
    assert lines[2 * epoch]["loss"] < 0.85 * lines[1]["loss"]
    assert lines[2 * epoch]["val_loss"] < lines[epoch]["val_loss"]


def test_the_learning_rate_written_is_that_of_the_schedule():
    lines = metrics(finished_run())
    schedule = configuration(finished_run()).lr_schedule
    expected = [learning_rate(step, len(lines), 1e-2, schedule) for step in lines]
    assert [line["lr"] for line in lines.values()] == expected
    assert expected[0] == 0.0025 and expected[3] == 1e-2 and expected[-1] == 1e-4


def test_the_first_loss_is_that_of_the_new_model_on_the_first_batch():
    config = configuration(finished_run())
    data = prepare(config.data.train_path, tokenizer(), config.data.cache_dir, progress=False)
    batch = Batches(data, 48, 12, config.training.seed).next()
    model = Llama(config.model, seed=config.training.seed)
    trained_tokens = int((batch.targets >= 0).sum())
    expected = model.loss(*on_device(batch)).item() / trained_tokens
    assert metrics(finished_run())[1]["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_resolved_configuration_is_written_and_loads_again():
    run = finished_run()
    config = load_config(run / "config.toml")
    assert config == configuration(
        run, "checkpointing.save_every=1", f"data.val_path={VAL_FILES!r}"
    )


def test_checkpoints_are_hugging_face_folders_with_the_state_to_resume():
    run, last = finished_run(), 2 * steps_per_epoch()
    assert names(run) == [*(f"step-{step:08d}" for step in range(1, last)), "final"]
    for name in ("step-00000001", "final"):
        verify(run / name)
        assert {path.name for path in (run / name).iterdir()} >= {
            "config.json",
            "model.safetensors",
            "tokenizer.model",
            "optimizer.safetensors",
            "training_state.json",
        }
    assert read_state(run / "final")["step"] == last
    assert open_tokenizer(run / "final").fingerprint == tokenizer().fingerprint
    assert Llama.from_pretrained(run / "final").config.num_kv_heads == 2


def test_the_last_checkpoint_holds_the_trained_weights():
    first, last = (
        SafetensorsFile(finished_run() / name / "model.safetensors")
        for name in ("step-00000001", "final")
    )
    assert set(first.names) == set(last.names)
    for name in last.names:
        assert np.abs(first.float32(name) - last.float32(name)).max() > 1e-3


def test_eval_every_save_every_keep_last_n_and_max_steps_act(tmp_path):
    run = tmp_path / "run"
    overrides = ["training.eval_every=3", "training.max_steps=7", "checkpointing.save_every=2"]
    overrides += ["checkpointing.keep_last_n=2", f"data.val_path={VAL_FILES!r}"]
    outcome = train(configuration(run, *overrides))
    assert (outcome.step, outcome.finished, outcome.checkpoint) == (7, True, run / "final")
    assert names(run) == ["step-00000004", "step-00000006", "final"]
    lines = metrics(run)
    assert [step for step, line in lines.items() if "val_loss" in line] == [3, 6, 7]


def test_a_spent_budget_ends_the_run_with_a_validation_and_a_final_checkpoint(tmp_path):
    run = tmp_path / "run"
    config = configuration(run, f"data.val_path={VAL_FILES!r}")
    outcome = train(config, budget_seconds=1e-3)
    assert outcome.finished and outcome.step == 2  # one step says nothing about the others
    assert names(run) == ["final"]
    assert ["val_loss" in line for line in metrics(run).values()] == [False, True]


def test_a_budget_is_shared_by_the_steps_of_this_process(tmp_path):
    run = trainer(configuration(tmp_path, "training.num_epochs=100"), budget_seconds=10.5)
    run.step = 12
    run._shorten(first=10, started=time.monotonic() - 4)  # 2 s a step, 6.5 s left
    assert run.total_steps == 15
    run._shorten(first=10, started=time.monotonic() - 11)
    assert run.total_steps == 12


def test_numbers_that_are_not_finite_stop_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", config_file(run), "--quiet", "--set", "training.learning_rate=1e36"]
    words += ["--set", "training.grad_clip=0", "--set", "checkpointing.save_every=1"]
    assert cli(*words, "--set", "lr_schedule.warmup_steps=2") == 2
    error = capsys.readouterr().err
    assert list(metrics(run)) == [1]
    assert error.startswith("step 2: loss ") and "gradient norm" in error
    assert "nan" in error or "inf" in error
    first = run / "step-00000001"
    assert f"{first} holds the weights that led to them, and there is no earlier one" in error
    assert "lower training.learning_rate" in error and "Traceback" not in error
    verify(first)


def test_the_last_good_checkpoint_is_the_one_that_a_finite_step_came_after(tmp_path):
    """Step 3 breaks the weights without making them infinite; what is saved then is not good."""
    steps = ["checkpointing.save_every=1", "training.max_steps=6", "training.grad_clip=0"]
    rate = ["training.learning_rate=1e36", "lr_schedule.warmup_steps=0"]
    two = train(configuration(tmp_path / "run", *steps[:1], "training.max_steps=2")).checkpoint
    good = two.rename(tmp_path / "run" / "step-00000002")
    run = trainer(configuration(tmp_path / "run", *steps, *rate), resume=good)
    with pytest.raises(TrainingError, match=f"step 4: loss .*last good checkpoint is {good}"):
        run.run()
    assert names(tmp_path / "run")[-2:] == ["step-00000002", "step-00000003"]


def broken_from(run, step):
    """Let a trainer see NaN from a step on, as weights that are broken give it."""
    stepped = run.train_step

    def train_step(batches, number, lr):
        result = stepped(batches, number, lr)
        return result._replace(loss=math.nan) if number >= step else result

    run.train_step = train_step
    return run


def test_a_nan_at_the_first_resumed_step_finds_the_checkpoint_before(tmp_path):
    every = ["checkpointing.save_every=2", "training.max_steps=4"]
    train(configuration(tmp_path / "run", *every))
    longer = configuration(tmp_path / "run", "training.max_steps=8")
    run = broken_from(trainer(longer, resume=tmp_path / "run" / "final"), 5)
    good = tmp_path / "run" / "step-00000002"
    with pytest.raises(TrainingError, match=rf"step 5: .*{good} \(--resume {good} goes back to it"):
        run.run()


def test_what_to_go_back_to_may_lie_in_another_folder(tmp_path):
    first = train(configuration(tmp_path / "a b", "training.max_steps=4")).checkpoint
    steps = ["training.max_steps=8", "checkpointing.save_every=1"]
    run = broken_from(trainer(configuration(tmp_path / "run", *steps), resume=first), 6)
    with pytest.raises(TrainingError) as stopped:
        run.run()
    way = f"--resume '{first}' with another checkpointing.checkpoint_dir goes back to it"
    assert f"the last good checkpoint is {first} ({way})" in str(stopped.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    run = trainer(configuration(tmp_path / "run", "training.max_steps=2"))
    name, tensor = list(run.optimizer.parameters.items())[3]
    stepped = run.train_step

    def breaks(*arguments):
        result = stepped(*arguments)
        if arguments[1] == 2:
            broken = read(tensor).copy()
            broken.flat[7] = value
            write(tensor, broken)
        return result

    run.train_step = breaks
    refusal = rf"step 2: {name}: the weights are no longer finite, .*nothing was saved"
    with pytest.raises(TrainingError, match=refusal):
        run.run()
    assert names(tmp_path / "run") == []


def test_the_first_step_that_is_not_finite_looks_at_what_was_given(tmp_path):
    run = trainer(configuration(tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"step 1: loss nan, .*nothing was saved.*model\.base"):
        run._check_finite(1, {"loss": math.nan, "gradient norm": 1.0})


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run = trainer(configuration(tmp_path / "run", f"data.val_path={VAL_FILES!r}"))
    found = run.evaluator.run()._replace(loss=math.inf)
    monkeypatch.setattr(run.evaluator, "run", lambda stopping: found)
    with pytest.raises(TrainingError, match=rf"step {steps_per_epoch()}: validation loss inf"):
        run.run()
    assert list(metrics(tmp_path / "run")) == list(range(1, steps_per_epoch() + 1))


def test_a_folder_that_holds_checkpoints_is_not_mixed_with_a_new_run(capsys):
    run = finished_run()
    before = metrics(run)
    assert cli("train", config_file(run), "--quiet") == 2
    error = capsys.readouterr().err
    assert f"{run} already holds final: continue it with --resume, or choose" in error
    assert metrics(run) == before


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_text_is_read(
    tmp_path, capsys, folder
):
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / folder
    override = f"checkpointing.checkpoint_dir={place}"
    assert cli("train", config_file(tmp_path / "run"), "--quiet", "--set", override) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"checkpointing.checkpoint_dir: {place} cannot be written: ")
    assert len(shown.err.splitlines()) == 1 and "fits" not in shown.out


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """A lock belongs to an open file, so this process can stand for another one."""
    run = trainer(configuration(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"), pytest.raises(CheckpointError, match="another process trains the"):
        run.run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert run.run().finished


def test_a_device_without_memory_is_told_with_what_to_lower(tmp_path, monkeypatch, capsys):
    run = trainer(configuration(tmp_path / "run", "checkpointing.save_every=2"))
    step = run.train_step

    def short_of_memory(batches, number, lr):
        if number == 3:
            raise MemoryError("Allocation of 12.00 GB failed on CL. Used: 1.03 GB")
        return step(batches, number, lr)

    monkeypatch.setattr(run, "train_step", short_of_memory)
    with pytest.raises(TrainingError) as refused:
        run.run()
    last = tmp_path / "run" / "step-00000002"
    assert str(refused.value) == (
        f"out of memory after step 2, and the last checkpoint is {last}: Allocation of 12.00 GB "
        "failed on CL. Used: 1.03 GB; lower training.micro_batch_size or data.context_length, or "
        "set training.checkpoint_activations = true"
    )

    def generate():
        raise MemoryError("Allocation of 12.00 GB failed on CL.")

    def bare():
        raise MemoryError

    assert exit_code(bare, "train") == 2
    assert capsys.readouterr().err == "train: out of memory: the system has no more\n"
    assert exit_code(generate, "generate") == 2
    assert capsys.readouterr().err == (
        "generate: out of memory: Allocation of 12.00 GB failed on CL.\n"
    )


def test_a_run_that_was_there_first_and_has_finished_is_left_alone(tmp_path):
    first, second = (trainer(configuration(tmp_path / "run")) for _ in range(2))
    assert first.run().finished
    with pytest.raises(CheckpointError, match="run already holds final: continue it with --resum"):
        second.run()
    assert names(tmp_path / "run") == ["final"]


def test_only_the_lock_says_that_another_process_trains(tmp_path):
    with pytest.raises(BlockingIOError), held_alone(tmp_path):
        raise BlockingIOError


def test_a_file_system_without_locks_lets_a_run_go_on(tmp_path, monkeypatch):
    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with held_alone(tmp_path):
        pass


def test_sizes_that_a_run_does_not_reach_are_told(tmp_path):
    sizes = ["training.batch_size=1000", "lr_schedule.warmup_steps=50", "training.num_epochs=3"]
    run = trainer(configuration(tmp_path / "run", *sizes))
    windows = run.batches.n_windows
    assert run.notices() == [
        f"training.batch_size is 1000, and the text fills {windows} sequences: the rest of each"
        " batch is empty",
        "lr_schedule.warmup_steps is 50, and the run has 3 steps: the learning rate rises to 0.0006"
        " only",
    ]
    fitting = [f"training.batch_size={windows}", "lr_schedule.warmup_steps=3", sizes[2]]
    assert trainer(configuration(tmp_path / "run", *fitting)).notices() == []


def test_text_that_is_trained_on_and_validated_on_is_noticed(tmp_path):
    text, copy = tmp_path / "text.txt", tmp_path / "copy.txt"
    text.write_text("def add(first, second):  # some code\n" * 200)
    copy.write_bytes(text.read_bytes())
    new = tmp_path / "new.txt"
    new.write_text("def sub(first, second):  # other code\n" * 20)

    def notices(*validated):
        paths = [f"data.train_path={text}", f"data.val_path={[str(v) for v in validated]!r}"]
        run = trainer(configuration(tmp_path / "run", *paths))
        return [line for line in run.notices() if "validation" in line]

    label, why = "data.val_path", "so its validation loss says nothing about new text"
    (line,) = notices(text, new)
    assert label in line and line.endswith(f": {text} is also trained on, {why}")
    (line,) = notices(new, copy)
    assert line.endswith(f": {copy} is also trained on (as {text}), {why}")
    assert notices(new) == []


def test_what_a_killed_run_left_is_settled_before_a_new_one(tmp_path):
    left = left_behind(tmp_path / "run", "step-00000003")
    left.mkdir(parents=True)
    check_fresh(configuration(tmp_path / "run"))
    assert not left.exists()


def test_a_tokenizer_is_trained_on_the_training_text_once(tmp_path):
    overrides = ["data.tokenizer=train", "data.tokenizer_vocab_size=350"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}"]
    config = configuration(tmp_path / "run", *overrides)
    first = trainer(config).tokenizer
    assert first.vocab_size == 350
    (file,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.model")
    written = file.stat().st_mtime_ns
    assert trainer(config).tokenizer.fingerprint == first.fingerprint
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["a letter", "cut", "no sum", "other sum", "empty", "a pipe"])
def test_a_damaged_trained_tokenizer_is_trained_again(tmp_path, capsys, damage):
    overrides = ["data.tokenizer=train", "data.tokenizer_vocab_size=350"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}"]
    config = configuration(tmp_path / "run", *overrides)
    first = trainer(config).tokenizer
    (file,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.model")
    sums = file.with_name("tokenizer.model.sha256")
    assert capsys.readouterr().err == ""
    if damage == "a letter":
        assert b"\x01e\x15" in first.model  # the piece "e"
        file.write_bytes(first.model.replace(b"\x01e\x15", b"\x01E\x15", 1))
    elif damage == "cut":
        file.write_bytes(first.model[:500])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif damage == "no sum":
        sums.unlink()
    else:
        sums.write_text("0" * 64 + "\n")
    assert trainer(config).tokenizer.model == first.model == file.read_bytes()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("; the tokenizer is trained again\n")
    assert trainer(config).tokenizer.model == first.model
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_cannot_be_made_names_its_option_and_the_text(tmp_path):
    (tmp_path / "short.txt").write_text("too short for so many pieces")
    text = f"data.train_path='{tmp_path}/short.txt'"
    config = configuration(tmp_path / "run", text, "data.tokenizer=train")
    with pytest.raises(TokenizerError) as refused:
        trainer(config)
    expected = (
        rf"data\.tokenizer_vocab_size, for a tokenizer of {tmp_path}/short\.txt: vocab_size \d+"
    )
    assert re.match(expected, str(refused.value))
    (tmp_path / "short.txt").write_bytes(b"\xff\xff no text")
    with pytest.raises(DataError, match=r"^[^:]*short\.txt"):
        trainer(config)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    config = configuration(tmp_path / "run", "model.vocab_size=399")
    with pytest.raises(
        ConfigError, match=r"^--set model\.vocab_size=399: got 399, must be at least the"
    ):
        trainer(config)
