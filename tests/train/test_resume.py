"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

import errno
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from runs_helpers import (
    TRAIN_FILES,
    VAL_FILES,
    cli,
    config_file,
    configuration,
    finished_run,
    left_behind,
    metrics,
    names,
    numbers,
    steps_per_epoch,
    train,
    trainer,
)

from tinyllama.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TinyllamaError,
)
from tinyllama.observe.metrics import MetricsLog
from tinyllama.system import device
from tinyllama.system.files import held
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.train.checkpoint import read_state, step_name, verify, write_state
from tinyllama.train.manifest import write_manifest
from tinyllama.train.prepare import (
    differences,
    find_tokenizer,
    resume_folder,
    with_micro_batch_of,
)
from tinyllama.train.run_folder import held_alone

VALIDATED = f"data.val_path={VAL_FILES!r}"


def same_weights_and_moments(first, second):
    return all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    )


def part_of(run, to, *kept):
    """A run's folder as it was when it held only these checkpoints."""
    to.mkdir()
    shutil.copy(run / "metrics.jsonl", to)
    for name in kept:
        shutil.copytree(run / name, to / name)
    return to


@pytest.mark.parametrize("at", ["in the warm-up", "within an epoch", "at the end of an epoch"])
def test_resuming_a_folder_continues_bit_for_bit(tmp_path, at):
    epoch = steps_per_epoch()
    step = {"in the warm-up": 2, "within an epoch": epoch + 3}.get(at, epoch)
    whole, run = finished_run(), tmp_path / "run"
    outcome = train(configuration(run, VALIDATED), resume=whole / step_name(step))
    assert (outcome.step, outcome.finished) == (2 * epoch, True)
    expected = {s: line for s, line in numbers(whole).items() if s > step}
    assert numbers(run) == expected and len(expected) > 3
    assert same_weights_and_moments(run / "final", whole / "final")


def test_resuming_within_accumulated_steps_continues_bit_for_bit(tmp_path):
    micro = ["training.micro_batch_size=4", "training.max_steps=6", "checkpointing.save_every=3"]
    train(configuration(tmp_path / "whole", *micro))
    train(configuration(tmp_path / "run", *micro), resume=tmp_path / "whole" / step_name(3))
    found, whole = numbers(tmp_path / "run"), numbers(tmp_path / "whole")
    assert found == {step: whole[step] for step in (4, 5, 6)}
    assert same_weights_and_moments(tmp_path / "run" / "final", tmp_path / "whole" / "final")
    # And accumulating is the big batch, up to rounding. The schedule of 6 steps begins alike.
    big = numbers(finished_run())
    for step in (1, 2, 3):
        assert whole[step]["loss"] == pytest.approx(big[step]["loss"], rel=1e-5)
        assert whole[step]["grad_norm"] == pytest.approx(big[step]["grad_norm"], rel=1e-4)


def test_a_resumed_run_keeps_the_micro_batch_that_was_chosen_for_it(tmp_path):
    """What fits may have changed, and sums of other parts round differently."""
    micro = ["training.micro_batch_size=4", "training.max_steps=2"]
    checkpoint = train(configuration(tmp_path / "run", *micro)).checkpoint
    batch = configuration(tmp_path / "run").training.batch_size
    unset, set_, other = (
        with_micro_batch_of(checkpoint, configuration(tmp_path / "run", *asked)).training
        for asked in ([], ["training.micro_batch_size=2"], ["training.batch_size=6"])
    )
    assert (unset.micro_batch_size, unset.batch_size) == (4, batch)
    assert (set_.micro_batch_size, other.micro_batch_size) == (2, None)
    words = ["train", config_file(tmp_path / "run"), "--quiet", "--resume", "--set"]
    assert cli(*words, "training.max_steps=3") == 0
    assert "micro_batch_size = 4" in (tmp_path / "run" / "config.toml").read_text()
    (state := checkpoint / "training_state.json").write_text('{"step": 2}')
    assert with_micro_batch_of(state.parent, configuration(tmp_path)).training.micro_batch == batch


def test_the_latest_checkpoint_is_resumed_and_every_step_is_written_once(tmp_path, capsys):
    whole, last = finished_run(), 2 * steps_per_epoch()
    run = part_of(whole, tmp_path / "run", step_name(last - 3), step_name(last - 2))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # killed while it wrote
    words = ["train", config_file(run), "--resume", "--set", VALIDATED]
    assert cli(*words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("backend CPU, ")
    assert f"resuming {run}/{step_name(last - 2)} at step {last - 2}" in out
    assert out[-1].startswith(f"finished: step {last}, saved {run}/final; loss ")
    assert numbers(run) == numbers(whole)
    assert same_weights_and_moments(run / "final", whole / "final")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3), step_name(4))
    file = run / step_name(4) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    warnings = []
    assert resume_folder(configuration(run), "latest", warnings.append) == run / step_name(3)
    (warning,) = warnings
    assert str(file) in warning
    assert f"{run / step_name(4)}: damaged, the checkpoint before it is tried" in warning
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        resume_folder(configuration(run), str(run / step_name(4)), warnings.append)


def test_what_a_kill_left_half_done_is_settled_before_resuming(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3), step_name(4))
    (run / step_name(3)).rename(left_behind(run, step_name(3)))
    (run / step_name(4)).rename(run / f".{step_name(4)}.next")
    assert resume_folder(configuration(run), "latest", print) == run / step_name(4)
    assert [path.name for path in run.iterdir() if path.is_dir()] == [step_name(4)]


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    run = part_of(finished_run(), tmp_path / "run", "final")
    before = metrics(run)
    written = (run / "final" / "manifest.json").stat().st_mtime_ns
    words = ["train", config_file(run), "--quiet", "--resume", "--set", VALIDATED]
    assert cli(*words) == 0
    assert f"finished: step {2 * steps_per_epoch()}, saved {run}/final" in capsys.readouterr().out
    assert metrics(run) == before
    assert (run / "final" / "manifest.json").stat().st_mtime_ns == written


def test_a_longer_schedule_goes_on_after_the_final_checkpoint(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", "final")
    last = 2 * steps_per_epoch()
    config = configuration(run, f"training.max_steps={last + 2}", "training.num_epochs=3")
    outcome = train(config, resume=run / "final")
    assert (outcome.step, names(run)) == (last + 2, ["final"])
    assert read_state(run / "final")["step"] == last + 2
    assert {step: line["epoch"] for step, line in metrics(run).items()}[last + 2] == 3


def test_going_back_sets_aside_what_came_later(tmp_path, capsys):
    """The next --resume must not take the newest of the former way."""
    whole, last = finished_run(), 2 * steps_per_epoch()
    run = part_of(whole, tmp_path / "run", step_name(3), step_name(4), step_name(6), "final")
    stop = [f"training.max_steps={last}", "training.learning_rate=1e-3"]
    again = trainer(configuration(run, *stop), resume=run / step_name(4))
    again.planned_steps = again.total_steps = 5
    outcome, warnings = again.run(), capsys.readouterr().err
    assert (outcome.step, outcome.finished) == (5, True)
    assert names(run) == [step_name(3), step_name(4), "final"]
    for old in (step_name(6), "final"):
        assert f"{run / old} is of a later step: renamed to {old}.aside-1\n" in warnings
        assert (run / f"{old}.aside-1" / "model.safetensors").read_bytes() == (
            whole / old / "model.safetensors"
        ).read_bytes()
    assert list(metrics(run)) == [1, 2, 3, 4, 5]
    former = (run / "metrics.jsonl.aside-1").read_bytes()
    assert former == (whole / "metrics.jsonl").read_bytes()
    assert resume_folder(configuration(run), "latest", pytest.fail) == run / "final"
    assert read_state(run / "final")["step"] == 5


def test_nothing_is_renamed_before_the_metrics_are_copied(tmp_path, monkeypatch):
    run = part_of(finished_run(), tmp_path / "run", step_name(3), "final")
    again = trainer(configuration(run), resume=run / step_name(3))

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = metrics(run)
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.train.run_folder.atomic_write", full)
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl\.aside-1"):
            again.run()
    assert (names(run), metrics(run)) == ([step_name(3), "final"], before)


def test_metrics_of_another_run_are_not_mixed_with_those_of_one_that_comes_in(tmp_path):
    run = part_of(finished_run(), tmp_path / "run")
    foreign = (run / "metrics.jsonl").read_bytes()
    stop = ["training.max_steps=6", VALIDATED]
    train(configuration(run, *stop), resume=finished_run() / step_name(4))
    assert list(metrics(run)) == [5, 6]
    assert (run / "metrics.jsonl.aside-1").read_bytes() == foreign


def test_what_was_set_aside_is_resumed_in_a_folder_of_its_own(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3), "final")
    aside = (run / "final").rename(run / "final.aside-1")
    with pytest.raises(CheckpointError, match=f"run already holds {step_name(3)}"):
        resume_folder(configuration(run), str(aside), pytest.fail)
    other = configuration(tmp_path / "other")
    assert resume_folder(other, str(aside), pytest.fail) == aside


def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3), step_name(4))
    (tmp_path / "best").symlink_to(run / step_name(3))
    assert resume_folder(configuration(run), str(tmp_path / "best"), pytest.fail).exists()


def test_a_checkpoint_that_lies_elsewhere_behind_a_link_stays_there(tmp_path):
    run, last = part_of(finished_run(), tmp_path / "run"), 2 * steps_per_epoch()
    shutil.copytree(finished_run() / "final", tmp_path / "elsewhere")
    (run / "final").symlink_to(tmp_path / "elsewhere")
    config = configuration(run, f"training.max_steps={last + 1}", "training.num_epochs=3")
    assert train(config, resume=run / "final").step == last + 1
    assert not (run / "final").is_symlink()
    assert read_state(run / "final")["step"] == last + 1
    assert read_state(tmp_path / "elsewhere")["step"] == last


def test_a_finished_run_is_saved_where_it_is_continued(tmp_path):
    outcome = train(configuration(tmp_path / "run"), resume=finished_run() / "final")
    assert (outcome.checkpoint, outcome.finished) == (tmp_path / "run" / "final", True)
    assert names(tmp_path / "run") == ["final"]


def test_a_budget_that_ended_in_a_validation_is_not_given_again(tmp_path, monkeypatch):
    words = ["training.num_epochs=1000", VALIDATED]
    first = trainer(configuration(tmp_path / "run", *words), budget_seconds=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.train.trainer.stopping_on_signals", stopping_at(first, 2))
        outcome = first.run()
    assert (outcome.step, outcome.finished) == (2, False)
    config = configuration(tmp_path / "run", *words)
    last = trainer(config, resume=outcome.checkpoint, budget_seconds=60).run()
    assert (last.step, last.finished) == (2, True)
    assert "val_loss" in metrics(tmp_path / "run")[2]


def test_a_validation_that_is_made_up_for_costs_no_line_where_it_fails(tmp_path, monkeypatch):
    run = part_of(finished_run(), tmp_path / "run", step_name(steps_per_epoch() - 1))
    first = trainer(configuration(run, VALIDATED), resume=run / step_name(steps_per_epoch() - 1))
    with monkeypatch.context() as patch:
        patch.setattr(
            "tinyllama.train.trainer.stopping_on_signals", stopping_at(first, first.step + 1)
        )
        checkpoint = first.run().checkpoint
    second, before = trainer(configuration(run, VALIDATED), resume=checkpoint), metrics(run)

    def killed(stopping):
        raise KeyboardInterrupt

    monkeypatch.setattr(second.evaluator, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        second.run()
    assert metrics(run) == before and len(before) == steps_per_epoch()


def test_a_run_is_not_continued_in_the_folder_of_another_one(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3))
    with pytest.raises(CheckpointError, match=f"run already holds {step_name(3)}"):
        resume_folder(configuration(run), str(finished_run() / step_name(4)), pytest.fail)


def test_a_folder_in_which_a_run_is_going_on_is_left_alone(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(3))
    (run / step_name(3)).rename(run / f".{step_name(3)}.next")
    with held(run), pytest.raises(CheckpointError, match="another process trains there"):
        resume_folder(configuration(run), "latest", pytest.fail)
    assert (run / f".{step_name(3)}.next").is_dir()


def stopping_at(run, step):
    """A stand-in for stopping_on_signals: a signal comes during the validation after `step`."""

    @contextmanager
    def stopping_on_signals(*_):
        yield lambda: run.step >= step

    return stopping_on_signals


@pytest.mark.parametrize("at", ["the first epoch", "the end"])
def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch, at):
    whole, epoch = finished_run(), steps_per_epoch()
    step = epoch if at == "the first epoch" else 2 * epoch
    run = part_of(whole, tmp_path / "run", step_name(step - 1))
    first = trainer(configuration(run, VALIDATED), resume=run / step_name(step - 1))
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.train.trainer.stopping_on_signals", stopping_at(first, step))
        outcome = first.run()
    assert (outcome.checkpoint, outcome.finished) == (run / step_name(step), False)
    assert "val_loss" not in metrics(run)[step]
    second = trainer(configuration(run, VALIDATED), resume=outcome.checkpoint)
    assert second.run().finished
    assert numbers(run) == numbers(whole)
    assert same_weights_and_moments(run / "final", whole / "final")
    assert "unvalidated" not in read_state(run / "final")


def test_a_run_that_goes_on_otherwise_says_in_what(tmp_path, capsys, monkeypatch):
    run = part_of(finished_run(), tmp_path / "run", step_name(4))
    words = ["train", config_file(run), "--quiet", "--resume", "--set", "training.max_steps=5"]
    assert cli(*words, "--set", "training.batch_size=6", "--threads", "1") == 0
    shown = capsys.readouterr().out.splitlines()
    (notice,) = [line for line in shown if " was trained with other options" in line]
    threads = read_state(run / step_name(4))["made_with"]["threads"]
    assert notice == (
        f"{run / step_name(4)} was trained with other options, so the losses are not those of a run"
        " that was never stopped: threads is 1, was "
        f"{threads}; training.batch_size is 6, was 12; training.max_steps is 5, was nothing"
    )
    device.set_threads(threads)


@pytest.mark.parametrize("written", ["now", "by an older version"])
def test_a_plain_resume_says_nothing(tmp_path, capsys, written):
    """cases/25: the micro-batch was compared after it had been filled in."""
    run = part_of(finished_run(), tmp_path / "run", step_name(4))
    made_with = read_state(run / step_name(4))["made_with"]
    assert made_with["training.micro_batch_size"] == made_with["training.batch_size"] == 12
    if written != "now":
        older = {"training.micro_batch_size": None, "data.train_on": "all"}
        edit_made_with(run / step_name(4), older, ("data.pack", "data.template"))
    words = ["train", config_file(run), "--quiet", "--resume", "--set", "training.max_steps=5"]
    edit_made_with(run / step_name(4), {"training.max_steps": 5})
    assert cli(*words) == 0
    assert "other options" not in "".join(capsys.readouterr())


def edit_made_with(checkpoint, changes, dropped=()):
    """Change what a checkpoint says it was made with; its manifest follows."""
    state = read_state(checkpoint)
    made_with = state["made_with"] | changes
    state["made_with"] = {k: v for k, v in made_with.items() if k not in dropped}
    write_state(checkpoint, state)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {})


def test_data_options_that_decide_what_is_learned_are_compared(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(4)) / step_name(4)
    assert read_state(run)["made_with"]["data.train_on"] is None
    edit_made_with(run, {"data.train_on": "last"})
    says = differences(configuration(tmp_path / "other"), run)
    assert says.endswith('never stopped: data.train_on is nothing, was "last"')


def test_parts_of_the_batch_that_differ_are_said_as_they_were(tmp_path):
    run = part_of(finished_run(), tmp_path / "run", step_name(4)) / step_name(4)
    says = differences(configuration(tmp_path / "other", "training.micro_batch_size=4"), run)
    assert says.endswith("never stopped: training.micro_batch_size is 4, was 12")
    assert differences(configuration(tmp_path, "training.micro_batch_size=12"), run) is None
    other = differences(configuration(tmp_path, "training.batch_size=6"), run)
    assert other.endswith("never stopped: training.batch_size is 6, was 12")


def test_a_run_that_goes_on_as_it_was_says_nothing(tmp_path):
    run = finished_run() / step_name(4)
    places = ["checkpointing.save_every=7", f"data.cache_dir={tmp_path}", VALIDATED]
    assert trainer(configuration(tmp_path / "run", *places), resume=run).notices() == []
    (tmp_path / "training_state.json").write_text('{"step": 2}')  # as it was before
    assert differences(configuration(tmp_path / "run"), tmp_path) is None


def rows_of(run):
    """The trained rows that a run takes from now on, as bytes; the list grows with each step."""
    rows, following = [], run.batches.next

    def noting():
        batch = following()
        trained = (batch.targets >= 0).any(1)
        rows.extend(row.tobytes() for row in batch.tokens[trained])
        return batch

    run.batches.next = noting
    return rows


@pytest.mark.parametrize("size", [24, 4])
def test_with_another_batch_size_every_window_is_still_trained_once_per_epoch(tmp_path, size):
    """cases/07: the steps left were those of the former size, the schedule as wrong."""
    whole, at = finished_run(), steps_per_epoch() + 2
    sized = [f"training.batch_size={size}", VALIDATED]
    run = trainer(configuration(tmp_path / "run", *sized), resume=whole / step_name(at))
    same = trainer(configuration(tmp_path / "same", VALIDATED), resume=whole / step_name(at))
    rows, expected = rows_of(run), rows_of(same)
    assert run.run().finished and same.run().finished
    assert sorted(rows) == sorted(expected) and len(rows) == run.batches.n_windows - 2 * 12
    found = numbers(tmp_path / "run")
    assert list(found) == list(range(at + 1, at + 1 + -(-len(rows) // size)))
    rates = [line["lr"] for line in found.values()]
    former = numbers(whole)[at]["lr"]
    assert rates[-1] == pytest.approx(1e-4) and former > rates[0] > rates[-1]
    assert all("val_loss" not in line for line in list(found.values())[:-1])


def test_a_run_with_another_batch_size_is_resumed_bit_for_bit_too(tmp_path):
    whole = finished_run() / step_name(steps_per_epoch() + 1)
    sized = ["training.batch_size=4", "checkpointing.save_every=1"]
    train(configuration(tmp_path / "run", *sized), resume=whole)
    middle = tmp_path / "run" / step_name(steps_per_epoch() + 5)
    again = trainer(configuration(tmp_path / "again", *sized), resume=middle)
    assert again.notices() == []
    again.run()
    found, expected = numbers(tmp_path / "again"), numbers(tmp_path / "run")
    assert found == {s: x for s, x in expected.items() if s > steps_per_epoch() + 5}
    assert same_weights_and_moments(tmp_path / "again" / "final", tmp_path / "run" / "final")


def test_resuming_where_nothing_was_saved_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="run: holds no checkpoint to resume from"):
        resume_folder(configuration(tmp_path / "run"), "latest", print)
    with pytest.raises(CheckpointError, match="--resume nope: no such folder"):
        resume_folder(configuration(tmp_path / "run"), "nope", print)
    with pytest.raises(
        CheckpointError, match=r"is no checkpoint but holds some; its newest is .*fin"
    ):
        resume_folder(configuration(tmp_path / "run"), str(finished_run()), print)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    config = configuration(tmp_path / "run", "model.intermediate_size=96")
    with pytest.raises(
        ConfigError, match=r"^--set model\.\w+=96: got 96, must be 128 as in .*/final/config"
    ):
        trainer(config, resume=finished_run() / "final")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tokenizer='{run}/final/nope.model'", "data.tokenizer: .*nope.model: no such file"),
        (
            "data.tokenizer=train data.tokenizer_vocab_size=300",
            "data.tokenizer_vocab_size: got 300, must be",
        ),
        ("data.tokenizer='{other}'", "data.tokenizer: .* is not the tokenizer of .*final"),
    ],
)
def test_a_resumed_run_with_another_tokenizer_is_refused(tmp_path, override, message):
    run, other = finished_run(), tmp_path / "other.model"
    train_tokenizer(["some other text, and not much of it"], 280, other)
    overrides = override.format(run=run, other=other).split()
    config = configuration(tmp_path / "run", *overrides)
    with pytest.raises(TinyllamaError, match=message):
        trainer(config, resume=run / "final")


def test_the_size_of_a_vocabulary_that_nobody_makes_is_not_compared(tmp_path):
    """With a base its tokenizer is used, and the option says nothing."""
    run, config = finished_run(), configuration(tmp_path / "run")
    data = replace(config.data, tokenizer=None, tokenizer_vocab_size=10)
    config = replace(config, data=data, model=replace(config.model, base=str(run / "final")))
    assert find_tokenizer(config, run / "final", False).vocab_size > 10


def test_a_checkpoint_of_another_text_is_refused(tmp_path):
    config = configuration(tmp_path / "run", f"data.train_path={TRAIN_FILES[2:]!r}")
    with pytest.raises(
        DataError,
        match="the checkpoint: it was trained on a different text or",
    ):
        trainer(config, resume=finished_run() / "final")


def test_metrics_that_a_disk_damaged_do_not_keep_a_checkpoint_from_being_resumed(tmp_path, capsys):
    run = part_of(finished_run(), tmp_path / "run", step_name(4))
    file = run / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join([whole[0], whole[1][:20] + "\n", *whole[2:4]]))
    train(configuration(run, f"data.val_path={VAL_FILES!r}"), resume=run / step_name(4))
    said = capsys.readouterr().err
    assert f"{file}: a line is damaged and left out" in said and f"{file}: lacks step 2" in said
    assert sorted(metrics(run)) == sorted(set(metrics(finished_run())) - {2})
    same = {s: line["loss"] for s, line in metrics(run).items() if s != 2}
    assert same == {s: line["loss"] for s, line in metrics(finished_run()).items() if s != 2}


def during(run, step, action):
    """A trainer of this run that does `action` after a step."""
    made = trainer(configuration(run, "checkpointing.save_every=2"))
    one_step = made._one_step

    def acting(*args):
        one_step(*args)
        if made.step == step:
            action()

    made._one_step = acting
    return made


def test_metrics_are_on_disk_before_each_checkpoint(tmp_path, monkeypatch):
    synced, sync = [], MetricsLog.sync
    monkeypatch.setattr(MetricsLog, "sync", lambda log: (synced.append(log.path), sync(log)))
    outcome = during(tmp_path / "run", 0, list).run()
    saves = (outcome.step - 1) // 2 + 1
    assert len(synced) == saves + 1  # and when the file is closed


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_whose_folder_is_removed_goes_on_and_says_so(tmp_path, capsys, step):
    run = tmp_path / "run"
    outcome = during(run, step, lambda: shutil.rmtree(run)).run()
    assert outcome.finished and outcome.checkpoint == run / "final"
    verify(run / "final")
    said = capsys.readouterr().err
    assert said.startswith(f"{run} was removed while training: the run goes on and saves in {run},")
    assert said.count("\n") == 1
    assert (run / "config.toml").is_file()
    assert sorted(metrics(run)) == list(range(step + 1, outcome.step + 1))
    last = read_state(finished_run() / "final")["step"]
    assert outcome.step == last and outcome.loss == metrics(finished_run())[last]["loss"]


def test_a_run_whose_folder_another_run_took_saves_beside_it(tmp_path, capsys):
    run = tmp_path / "run"
    others = ExitStack()

    def take():
        shutil.rmtree(run)
        run.mkdir()
        others.enter_context(held_alone(run))

    with others:
        outcome = during(run, 3, take).run()
    assert outcome.checkpoint == tmp_path / "run.aside-1" / "final"
    verify(outcome.checkpoint)
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_metrics_that_are_removed_while_training_are_begun_anew(tmp_path, capsys):
    run = tmp_path / "run"
    outcome = during(run, 3, (run / "metrics.jsonl").unlink).run()
    assert f"{run}/metrics.jsonl was removed while training: begun anew" in capsys.readouterr().err
    assert sorted(metrics(run)) == list(range(4, outcome.step + 1))
