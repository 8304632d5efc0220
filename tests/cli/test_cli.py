"""The command line: what it prints, its exit codes, and one-line messages for mistakes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from runs_helpers import (
    TRAIN_FILES,
    VAL_FILES,
    cli,
    config_file,
    environment,
    finished_run,
    metrics,
    names,
    run_command,
    start,
    steps_per_epoch,
    stop,
    tokenizer,
    wait_for_steps,
)

import tinyllama
from tinyllama.cli.app import COMMANDS
from tinyllama.cli.arguments import Parser
from tinyllama.cli.shared import model_folder
from tinyllama.config import SECTIONS
from tinyllama.config.options import allowed, options_of
from tinyllama.errors import ConfigError
from tinyllama.train.checkpoint import step_name


def test_training_as_a_module_prints_the_device_first_and_the_checkpoint_last(tmp_path):
    run = tmp_path / "run"
    words = ["train", config_file(run), "--set", "training.max_steps=2"]
    code, out, err = run_command(*words)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("backend CPU, ") and "renderer ClangJIT (DEV=CPU)" in lines[0]
    assert lines[-2] == "125,248 parameters, 2 steps of 12 x 48 tokens, float32"
    loss = metrics(run)[2]["loss"]
    assert lines[-1] == f"finished: step 2, saved {run}/final; loss {loss:.4f}"
    assert re.search(
        rf"^step 2/2, loss {loss:.4f}, \d+ tok/s, 0:00 left, \d+ MiB", err, re.MULTILINE
    )
    assert list(metrics(run)) == [1, 2] and names(run) == ["final"]


def test_quiet_prints_the_result_alone(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", config_file(run), "--quiet", "--set", "training.max_steps=1"]
    assert cli(*words, "--set", "lr_schedule.warmup_steps=1") == 0
    loss = metrics(run)[1]["loss"]
    said = f"finished: step 1, saved {run}/final; loss {loss:.4f}\n"
    assert capsys.readouterr() == (said, "")


def test_quiet_keeps_notices(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", config_file(run), "--quiet", "--set", "training.max_steps=1"]
    assert cli(*words, "--set", "lr_schedule.warmup_steps=9") == 0
    notice, result = capsys.readouterr().out.splitlines()
    assert notice.startswith("lr_schedule.warmup_steps is 9, and the run has 1 steps")
    assert result.startswith("finished: step 1")


def test_a_budget_says_what_it_does_before_it_starts(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli("train", config_file(run), "--budget", "0.001") == 0
    *_, summary, notice, result = capsys.readouterr().out.splitlines()
    assert summary.startswith("125,248 parameters, ")
    assert notice == (
        f"--budget: the schedule of {2 * steps_per_epoch()} steps is shortened to those that 0.001"
        " seconds allow, as the first steps show; then the run validates, saves, and exits with"
        " code 0"
    )
    assert result.startswith(f"finished: step 2, saved {run}/final; loss ")


def test_the_last_line_has_the_loss_and_the_validation_loss(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--set", "training.max_steps=2", "--set", f"data.val_path={VAL_FILES!r}"]
    words += ["--set", "training.eval_first=true"]
    assert cli("train", config_file(run), *words) == 0
    out, err = capsys.readouterr()
    lines = metrics(run)
    assert list(lines) == [0, 1, 2] and set(lines[0]) == {"step", "val_loss"}
    assert out.splitlines()[-1] == (
        f"finished: step 2, saved {run}/final;"
        f" loss {lines[2]['loss']:.4f}, validation loss {lines[2]['val_loss']:.4f}"
    )
    assert f"step 0, validation loss {lines[0]['val_loss']:.4f}\n" in err
    assert lines[0]["val_loss"] == pytest.approx(math.log(400), rel=0.02)
    assert cli("plot", run, "--out", tmp_path / "loss.png") == 0


def test_defaults_of_the_model_are_announced_with_what_to_set(tmp_path, capsys, monkeypatch):
    def planned(config, force):
        raise ConfigError("planned")

    monkeypatch.setattr("tinyllama.train.micro_batch.plan_run", planned)
    file = tmp_path / "bare.toml"
    text = f"[data]\ntrain_path = {TRAIN_FILES!r}\n[checkpointing]\ncheckpoint_dir = 'none'\n"
    file.write_text(text)
    assert cli("train", file) == 2
    notice = (
        "the configuration sets neither sizes of [model] nor model.base: this trains the sizes of"
        " 124m on 32 x 2048 tokens per step; set model.hidden_size, model.num_layers, ... or"
        " model.base, and training.batch_size"
    )
    assert capsys.readouterr().out.splitlines()[1] == notice
    assert cli("train", file, "--set", "training.batch_size=2") == 2
    assert "the sizes of 124m; set model.hidden_size, model.num_layers" in capsys.readouterr().out
    assert cli("train", file, "--set", "model.hidden_size=768") == 2
    assert "sets neither" not in capsys.readouterr().out


def test_an_override_acts(tmp_path, capsys):
    words = ["train", config_file(tmp_path / "run"), "--set", "training.max_steps=1"]
    words += ["--set", "model.num_layers=1", "--set", f"checkpointing.checkpoint_dir={tmp_path}/b"]
    assert cli(*words) == 0
    assert "88,256 parameters, 1 steps of" in capsys.readouterr().out
    assert names(tmp_path / "b") == ["final"]


def test_a_run_that_a_signal_stopped_says_so_in_its_exit_code_and_one_short_line(tmp_path):
    run = tmp_path / "run"
    words = [config_file(run), "--quiet", "--set", "training.num_epochs=100000"]
    for number, exit_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        resume = ["--resume"] if run.exists() else []
        process = start("train", *words, *resume)
        wait_for_steps(process, run, len(metrics(run)) + 1 if resume else 1)
        code, out, err = stop(process, number)
        step = len(metrics(run))
        assert (code, err) == (exit_code, "")
        assert out.splitlines()[-1] == (
            f"stopped after step {step}, saved {run / step_name(step)};"
            " to continue, repeat the command with --resume"
        )


def test_all_that_is_unsupported_is_reported_together_and_first(tmp_path, capsys):
    words = ["--set", "training.beam=2", "--set", "training.devices=2"]
    assert cli("train", config_file(tmp_path / "run"), "--resume", "nowhere", *words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines() == [
        "--set training.devices=2: got 2, must be 1 for now",
        "--set training.beam=2: got 2, must be 0 for now",
    ]


MISTAKES = {
    "an unknown key": (
        ["--set", "training.learnin_rate=1"],
        "--set training.learnin_rate=1: unknown key, the nearest is training.learning_rate",
    ),
    "a value out of range": (
        ["--set", "training.batch_size=0"],
        "--set training.batch_size=0: got 0, must be an integer of 1 or more",
    ),
    "text that is not there": (
        ["--set", "data.train_path=nowhere/*.txt"],
        "nowhere/*.txt",
    ),
    "a vocabulary that does not fit": (
        ["--set", "model.vocab_size=300"],
        "--set model.vocab_size=300: got 300, must be at least the tokenizer's 400",
    ),
    "a tokenizer that is not there": (
        ["--set", "data.tokenizer=nowhere.model"],
        "nowhere.model: no such file",
    ),
    "a base that is not there": (["--set", "model.base=nowhere"], "nowhere"),
    "nothing to resume": (["--resume"], "run: holds no checkpoint to resume from"),
    "a folder without a checkpoint": (["--resume", "nowhere"], "nowhere"),
    "more devices than one": (
        ["--set", "training.devices=2"],
        "--set training.devices=2: got 2, must be 1 for now",
    ),
    "a search for kernels": (
        ["--set", "training.beam=2"],
        "--set training.beam=2: got 2, must be 0 for now",
    ),
    "a part of conversations": (
        ["--set", "data.train_on=last"],
        "holds text, in which nobody speaks: set data.train_on to all, got last",
    ),
    "validation text that is not there": (
        ["--set", "data.tokenizer=nowhere.model", "--set", "data.val_path=none.txt"],
        "none.txt: no such file or folder (data.val_path names it; --set data.val_path=none",
    ),
    "no threads": (["--threads", "0"], "--threads: got 0, must be 1 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_training_is_one_message_and_exit_code_2(tmp_path, capsys, mistake):
    words, message = MISTAKES[mistake]
    assert cli("train", config_file(tmp_path / "run"), "--quiet", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_configuration_is_named_with_those_that_are_shipped(capsys):
    for word in ("nowhere.toml", "12m"):
        assert cli("train", word) == 2
        expected = f"{word}: no such file; configurations by name: 124m, 7b, demo or lora\n"
        assert capsys.readouterr().err == expected


def test_a_shipped_configuration_is_found_by_name_and_a_path_of_that_name_wins(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli("params", "7b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["base"] == 6_738_415_616
    (tmp_path / "7b").write_text("[model]\nnum_layers = 1\n")
    assert cli("params", "7b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"]["attention"] == 4 * 768**2
    (tmp_path / "124m").mkdir()
    assert cli("train", "124m") == 2
    assert capsys.readouterr().err == "124m: is a folder, must be a TOML file\n"


def test_a_run_stands_for_its_final_checkpoint_or_else_its_newest_step(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(finished_run() / step_name(step), run / step_name(step))
    assert model_folder(run) == run / step_name(2)
    shutil.copytree(finished_run() / step_name(1), run / "final")
    assert model_folder(run) == run / "final"
    assert model_folder(run / step_name(1)) == run / step_name(1)
    assert capsys.readouterr().err.splitlines() == [
        f"{run} is a run: {step_name(2)} is used",
        f"{run} is a run: final is used",
    ]
    (run / "final" / "manifest.json").unlink()  # a copy that was cut short
    assert model_folder(run) == run / step_name(2)
    assert cli("params", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 125_248


def test_what_is_no_model_is_called_what_it_is(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    found = {
        "pipe.gguf": "is no regular file",
        "file": "is a file, must be the folder of a model or end in .gguf",
        "empty": "holds neither a model nor a checkpoint of a run",
        "none": "no such file or folder",
    }
    for name, message in found.items():
        assert cli("generate", "--model", tmp_path / name) == 2
        assert capsys.readouterr().err == f"{tmp_path / name}: {message}\n"
    words = ["merge", "--base", tmp_path / "file", "--adapter", tmp_path / "empty"]
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert cli(*words, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"{tmp_path / 'file'}: not a folder\n"
    assert cli("plot", tmp_path / "none") == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: no such folder\n"
    assert cli("plot", tmp_path / "empty") == 2
    file = tmp_path / "empty" / "metrics.jsonl"
    assert capsys.readouterr().err == f"{file}: No such file or folder\n"
    file.write_text('{"step": 1, "loss": 2.5}\n')
    assert cli("plot", tmp_path / "empty", "--out", tmp_path) == 2
    assert capsys.readouterr().err == f"--out {tmp_path}: is a folder\n"


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_missing_model_is_named(capsys, command):
    words = ["--data", "x.txt"] if command == "evaluate" else []
    assert cli(command, "--model", "nowhere", *words) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys, command):
    from tinyllama.config import LlamaConfig
    from tinyllama.model.llama import Llama

    small = LlamaConfig(
        vocab_size=399, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8
    )
    folder = Llama(small).save_pretrained(tmp_path / "model", tokenizer())
    words = ["--data", "x.txt"] if command == "evaluate" else []
    assert cli(command, "--model", folder, *words) == 2
    message = f"{folder}: its tokenizer has 400 entries, must be at most the model's 399\n"
    assert capsys.readouterr().err == message


# Python buffers standard output unless this is set: a broken pipe shows when it is flushed.
BUFFERING = [{"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}]


@pytest.mark.parametrize("buffering", BUFFERING, ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["backends"], ["train", "--help"], ["evaluate", "--help"]])
def test_a_reader_that_has_gone_ends_the_command_with_141_and_no_message(words, buffering):
    with start(*words, **buffering) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.parametrize("buffering", BUFFERING, ids=["buffered", "unbuffered"])
def test_a_mistake_that_nobody_reads_has_its_exit_code(buffering):
    with start("train", "nowhere.toml", **buffering) as process:
        process.stdout.close()
        process.stderr.close()
        assert process.wait() == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("buffering", BUFFERING, ids=["buffered", "unbuffered"])
def test_output_that_cannot_be_written_is_a_mistake_in_one_line(buffering):
    words = [sys.executable, "-m", "tinyllama", "params", "124m", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(**buffering)
        )
    assert (done.returncode, done.stderr) == (2, "params: No space left on device\n")


@pytest.mark.parametrize("budget", ["0", "-5", "nan", "inf", "x"])
def test_a_budget_is_a_time(capsys, budget):
    assert cli("train", "configs/demo.toml", f"--budget={budget}") == 2
    assert f"got {budget!r}, must be a number of seconds above 0" in capsys.readouterr().err


def test_numbers_of_options_are_checked(capsys):
    for words in (["--max-new-tokens", "0"], ["--max-new-tokens", "x"], ["--top-k", "x"]):
        assert cli("generate", "--model", "x", *words) == 2
        assert f"argument {words[0]}: " in capsys.readouterr().err
    assert cli("evaluate", "--model", "x", "--data", "y", "--batch", "0") == 2
    assert "argument --batch: got '0', must be an integer of 1 or more" in capsys.readouterr().err


NAMES = [*COMMANDS]


def test_no_command_and_an_unknown_one_say_which_there_are(capsys):
    assert cli("trian") == 2
    expected = "no command 'trian', the nearest is train (see tinyllama --help)"
    assert capsys.readouterr().err == f"tinyllama: {expected}\n"
    assert cli() == 2
    error = capsys.readouterr().err
    assert all(name in error for name in NAMES) and len(error.splitlines()) == 1
    assert cli("--help") == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^    (\w+)", shown, re.MULTILINE)
    assert listed == NAMES


def test_the_version_is_the_packages_own(capsys):
    assert cli("--version") == 0
    assert capsys.readouterr().out == f"tinyllama {tinyllama.__version__}\n"


@pytest.mark.parametrize("command", NAMES)
def test_every_option_of_a_command_is_explained(command, capsys):
    parser = Parser(prog=command)
    COMMANDS[command].add_options(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert cli(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tinyllama {command} ")
    assert all(name in shown for action in parser._actions for name in action.option_strings)


@pytest.mark.parametrize("module", ["train", "generate", "evaluate", "bench", "backends"])
def test_a_command_is_a_module_too(module):
    shown = [
        subprocess.run(
            [sys.executable, "-m", *words, "--help"],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
        ).stdout
        for words in (["tinyllama", module], [f"tinyllama.{module}"])
    ]
    assert shown[0].startswith(f"usage: tinyllama {module}") and shown[0] == shown[1]


def test_an_unknown_option_names_the_nearest_before_anything_else_is_missed(capsys):
    assert cli("generate", "--promt", "x") == 2
    assert capsys.readouterr().err == (
        "tinyllama generate: no option --promt, the nearest is --prompt"
        " (see tinyllama generate --help)\n"
    )


@pytest.mark.parametrize("option", ["--lr", "--bf16", "--report-to", "--optim"])
def test_an_unknown_option_that_is_like_no_other_names_none(option, capsys):
    assert cli("generate", option, "x") == 2
    assert capsys.readouterr().err == (
        f"tinyllama generate: no option {option} (see tinyllama generate --help)\n"
    )


def test_text_that_looks_like_an_option_may_be_a_prompt(capsys):
    assert cli("generate", "--model", "nowhere", "--prompt", "-- a list") == 2
    assert capsys.readouterr().err.startswith("nowhere")
    assert cli("generate", "--model", "nowhere", "--prompt", "-5") == 2
    assert capsys.readouterr().err.startswith("nowhere")


def test_the_help_of_train_lists_every_option_of_the_configuration(capsys):
    assert cli("train", "--help") == 0
    assert "--help-options" in capsys.readouterr().out
    assert cli("train", "--help-options") == 0
    shown = capsys.readouterr().out
    options = [option for name, cls in SECTIONS.items() for option in options_of(name, cls)]
    assert re.findall(r"^  (\w+\.\w+) = ", shown, re.MULTILINE) == [o.key for o in options]
    flat = " ".join(shown.split())
    assert all(f"{o.help} allowed: {allowed(o.hint)}" in flat for o in options)
    assert "training.learning_rate = 0.0003 peak learning rate allowed: a finite number" in flat
    assert max(map(len, shown.splitlines())) <= 80


def test_the_tokenizer_and_the_plot_are_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some words of text\n" * 50)
    assert cli("tokenizer", "a.txt", "--vocab-size", 270, "--out", "t.model") == 0
    assert capsys.readouterr().out.startswith("t.model: 270 pieces from 1 files, 950 bytes; ")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert cli("plot", ".", "--out", "curve.png") == 0
    assert capsys.readouterr().out == "curve.png\n"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_merge_and_memory_are_commands_with_mistakes_in_one_line(capsys):
    words = ["merge", "--base", "a", "--adapter", "b", "--out", "c"]
    assert cli(*words, "--block-size", 32) == 2
    assert capsys.readouterr().err == "--block-size: goes with --quantized-base\n"
    assert cli(*words, "--quantized-base", "--block-size", 3) == 2
    assert "got 3, must be 2 or more and a multiple of 2" in capsys.readouterr().err
    assert cli("memory", "124m", "--device-memory", "x") == 2
    assert "got 'x', must be a number of bytes" in capsys.readouterr().err


def test_an_interrupt_before_training_exits_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyllama.config.load_config", interrupted)
    assert cli("train", "x.toml") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_damaged_newest_checkpoint_is_named_and_training_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    for number in (1, 2):
        shutil.copytree(finished_run() / step_name(number), run / step_name(number))
    (run / step_name(2) / "optimizer.safetensors").write_bytes(b"damaged")
    words = ["train", config_file(run), "--resume", "--set", "training.max_steps=2"]
    assert cli(*words) == 0
    out, err = capsys.readouterr()
    assert f"{run / step_name(2)}: damaged, the checkpoint before it is tried" in err
    assert f"resuming {run / step_name(1)} at step 1" in out
