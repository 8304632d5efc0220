"""Signals to real training processes: a polite one saves and says how to go on, a kill harms
nothing that was complete."""

import os
import random
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from pathlib import Path

import pytest
from runs_helpers import (
    VAL_FILES,
    config_file,
    configuration,
    environment,
    metrics,
    names,
    numbers,
    run_command,
    start,
    steps_per_epoch,
    stop,
    train,
    trainer,
    wait_for_steps,
)

from tinyllama.observe.metrics import read_metrics
from tinyllama.system.signals import (
    GRACE_SECONDS,
    REPEAT_SECONDS,
    Terminated,
    stopping_on_signals,
    terminating,
)
from tinyllama.train.checkpoint import (
    list_checkpoints,
    read_state,
    step_name,
    verify,
)
from tinyllama.train.prepare import resume_folder

ENDLESS = ["--set", "training.num_epochs=100000"]
# A rate that does not depend on the length of the schedule.
CONSTANT = ["--set", "lr_schedule.type=constant"]
KILLS, SERIES = 20, 2


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run with a space"
    process = start("train", config_file(run), "--quiet", "--threads", 1, *ENDLESS)
    wait_for_steps(process, run, 3)
    code, out, err = stop(process, signal.SIGINT)
    done = len(metrics(run))
    assert (code, err) == (130, "")
    assert names(run) == [step_name(done)]
    saved = run / step_name(done)
    assert out == (
        f"stopped after step {done}, saved {saved}; to continue, repeat the command with --resume\n"
    )
    resumed = start("train", config_file(run), "--threads", 1, *ENDLESS, "--resume")
    wait_for_steps(resumed, run, done + 3)
    code, out, err = stop(resumed, signal.SIGTERM)
    assert code == 143 and "stopping after this step" in err
    assert f"resuming {saved} at step {done}" in out
    again = len(metrics(run))
    assert again >= done + 3 and list(metrics(run)) == list(range(1, again + 1))
    assert names(run) == [step_name(done), step_name(again)]
    for folder in list_checkpoints(run):
        verify(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_begins_ends_the_run_with_one_line(tmp_path, number):
    """Making a tokenizer of so much text takes seconds, and the signal comes before that ends."""
    run = tmp_path / "run"
    text = f"data.train_path={sysconfig.get_path('stdlib')}/*.py"
    words = ["--set", text, "--set", f"data.cache_dir={tmp_path / 'cache'}"]
    # Whoever runs the tests in the background ignores SIGINT, which processes inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("train", config_file(run), *words)
    signal.signal(signal.SIGINT, before)
    assert process.stdout.readline().startswith("backend CPU")
    code, _, err = stop(process, number)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert code == 128 + number and err.splitlines()[-1] == word and "Traceback" not in err
    assert not run.exists()


def test_the_first_signal_asks_and_the_second_interrupts(monkeypatch):
    monkeypatch.setattr("tinyllama.system.signals.REPEAT_SECONDS", 0)
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("ignored", [True, False])
def test_a_lost_terminal_asks_to_stop_unless_it_is_to_be_ignored(ignored):
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with stopping_on_signals() as stopping:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopping() is not ignored
    signal.signal(signal.SIGHUP, before)


def test_an_interrupt_that_takes_the_reader_along_still_saves(tmp_path):
    """As Ctrl-C does under `2>&1 | tee log`: it ends tee too."""
    run = tmp_path / "run"
    process = start("train", config_file(run), *ENDLESS)
    wait_for_steps(process, run, 2)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    with process:
        out = process.stdout.read()
    assert process.returncode == 130
    assert f"saved {run}/{names(run)[-1]}; to continue, repeat" in out


def test_a_signal_that_comes_twice_at_once_is_one():
    with stopping_on_signals() as stopping:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stopping()


def test_a_second_signal_reports_what_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllama.system.signals.REPEAT_SECONDS", 0)
    run = trainer(configuration(tmp_path / "run"))
    monkeypatch.setattr(run, "_one_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="after step 0, and nothing was saved"):
        monkeypatch.setattr(run, "save", lambda _: os.kill(os.getpid(), signal.SIGINT))
        run.run()


def test_an_interrupt_while_older_ones_are_removed_finds_the_new_one_saved(tmp_path, monkeypatch):
    def interrupted(saved, keep_last_n):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyllama.train.checkpoint._prune", interrupted)
    run = trainer(configuration(tmp_path / "run", "checkpointing.save_every=2"))
    saved = tmp_path / "run" / step_name(2)
    with pytest.raises(
        KeyboardInterrupt, match=f"after step 2, and the last checkpoint is {saved}"
    ):
        run.run()
    verify(saved)


INTERRUPTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "bench"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", ["tinygrad", "numpy"])
def test_a_signal_during_imports_ends_with_one_line(tmp_path, command, number, name):
    """Python imports sitecustomize first, and that sends the signal when an import begins."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(name=name, number=number))
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    (tmp_path / "config.json").write_text("{}")  # looks like a model, which is read later
    words = {"train": [config_file(tmp_path / "run")], "generate": ["--model", tmp_path]}
    words["bench"] = words["train"]
    args = words.get(command, ["--model", tmp_path, "--data", tmp_path])
    code, out, err = run_command(command, *args, PYTHONPATH=path)
    word = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[number]
    assert (code, out, err) == (128 + signal.Signals[number], "", f"{word}\n")


def test_a_signal_during_a_validation_cuts_it_short(tmp_path, monkeypatch):
    run = trainer(configuration(tmp_path / "run", f"data.val_path={VAL_FILES!r}"))
    loss, seen = run.evaluator._summed_loss, []

    def summed_loss(*inputs):
        seen.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*inputs)

    monkeypatch.setattr(run.evaluator, "_summed_loss", summed_loss)
    outcome = run.run()
    assert (len(seen), outcome.finished, outcome.step) == (1, False, steps_per_epoch())
    assert "val_loss" not in metrics(tmp_path / "run")[outcome.step]
    verify(outcome.checkpoint)


def kill_and_resume(run, seed):
    """Kill a run that saves every step, and resume it, several times; the steps it got to."""
    moments, steps = random.Random(seed), [0]
    words = ["train", run.with_name("tiny.toml"), "--quiet", *ENDLESS, *CONSTANT]
    words += ["--set", "checkpointing.save_every=1", "--set", "checkpointing.keep_last_n=3"]
    for _ in range(KILLS // SERIES):
        written = written_steps(run)
        process = start(*words, *(["--resume"] if names(run) else []))
        if moments.random() < 0.9:  # else it may be killed while it starts
            wait_for_steps(process, run, written + 1)
        time.sleep(moments.uniform(0, 0.5))
        code, _, err = stop(process, signal.SIGKILL)
        assert (code, err) == (-signal.SIGKILL, "")
        for folder in list_checkpoints(run):
            verify(folder)
        # A step's line is written before the step is saved: at most one is lost, none that was.
        step = read_state(list_checkpoints(run)[-1])["step"] if names(run) else 0
        assert step >= max(steps[-1], written_steps(run) - 1)
        steps.append(step)
    return steps


def written_steps(run):
    file = run / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


def test_kills_at_twenty_random_moments_lose_nothing_that_was_complete(tmp_path):
    runs = [tmp_path / str(number) / "run" for number in range(SERIES)]
    for run in runs:
        run.parent.mkdir()
        config_file(run)
    with ThreadPoolExecutor(SERIES) as pool:
        reached = list(pool.map(kill_and_resume, runs, range(SERIES)))
    assert all(steps[-1] >= KILLS // SERIES // 2 for steps in reached)

    whole, last = tmp_path / "whole", max(steps[-1] for steps in reached) + 2
    overrides = [CONSTANT[1], ENDLESS[1], f"training.max_steps={last}"]
    train(configuration(whole, *overrides))
    for run in runs:
        config = configuration(run, *overrides)
        train(config, resume=resume_folder(config, "latest", pytest.fail))
        assert numbers(run) == numbers(whole)


def test_a_signal_that_python_lost_ends_a_run_before_it_begins(monkeypatch):
    """An exception that a destructor meets is dropped."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the signal silences

    class Lossy:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with terminating():
        Lossy()
        with pytest.raises(Terminated), stopping_on_signals():
            pytest.fail("the run begins")
    with stopping_on_signals() as stopping:  # it is forgotten with the command
        assert not stopping()


def test_a_thread_that_a_signal_left_behind_does_not_keep_the_process(tmp_path):
    code = """
import threading
from tinyllama.cli.arguments import exit_code, leave
def run():
    threading.Thread(target=threading.Event().wait).start()  # nobody will wake it
    print("begun")
    raise KeyboardInterrupt("after step 3")
leave(exit_code(run, "test"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "begun\n")
    assert done.stderr == "interrupted after step 3\n"


def main_thread_seconds(process):
    """Processor time of a process's main thread, which stands still in a call into a driver."""
    fields = Path(f"/proc/{process.pid}/task/{process.pid}/stat").read_text().rpartition(")")[2]
    return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="watches a thread as Linux can")
@pytest.mark.skipif(find_library("OpenCL") is None, reason="no OpenCL here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_first_step_that_opencl_does_not_return_from(tmp_path, number):
    """pocl compiles, since its cache is empty, and then computes the step within one call."""
    (tmp_path / "pocl").mkdir()
    sizes = {
        "model.hidden_size": 512,
        "model.intermediate_size": 2048,
        "model.num_layers": 1,
        "model.max_seq_len": 256,
        "data.context_length": 256,
        "training.batch_size": 60,
        "training.micro_batch_size": 12,
    }
    run = tmp_path / "run"
    words = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(
        "train", config_file(run), *words, CL="1", POCL_CACHE_DIR=str(tmp_path / "pocl")
    )
    signal.signal(signal.SIGINT, before)
    assert any("steps of 60 x 256 tokens" in line for line in process.stdout)
    busy, deadline = -1.0, time.monotonic() + 240
    while busy != (busy := main_thread_seconds(process)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(3)
    process.send_signal(number)
    time.sleep(REPEAT_SECONDS + 0.5)
    assert process.poll() is None and not (run / "metrics.jsonl").read_text()
    sent = time.monotonic()
    code, _, err = stop(process, number)
    assert time.monotonic() - sent < GRACE_SECONDS + 5
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert code == 128 + number
    assert err.splitlines()[-1] == f"{word} after step 0, and nothing was saved"
    assert names(run) == []


# Waits in a call that a signal does not end, as a driver's do; Python's handlers wait too.
BLOCKED = """
import ctypes, signal, sys
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system.signals import stopping_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
mutex = ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
def wait():
    print("waiting", flush=True)
    library.pthread_mutex_lock(mutex)
def train():
    with stopping_on_signals("stopping\\n", lambda: "after step 3"):
        wait()
leave(exit_code({"wait": wait, "train": train}[sys.argv[1]], "test"))
"""


def blocked(command):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, command], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_command_that_does_not_return_from_a_call(number):
    code, _, err = stop(blocked("wait"), number)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert (code, err) == (128 + number, f"{word}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_of_a_run_is_announced_within_a_call_and_the_second_ends_it(number):
    process = blocked("train")
    process.send_signal(number)
    assert process.stderr.readline() == "stopping\n"
    process.send_signal(number)  # at once: the same signal
    time.sleep(GRACE_SECONDS + 0.5)
    assert process.poll() is None
    code, _, err = stop(process, number)
    word, code_of = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
    assert (code, err) == (code_of, f"{word} after step 3\n")


def test_a_command_that_handled_its_signal_may_take_its_time_to_unwind():
    code = """
import os, signal, sys, time
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system.signals import GRACE_SECONDS
def run():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        time.sleep(GRACE_SECONDS + 1)
        print("unwound")
leave(exit_code(run, "test"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "unwound\n", "terminated\n")


def test_a_command_that_is_over_leaves_no_thread_and_no_wakeup_descriptor():
    def watching():
        return [thread for thread in threading.enumerate() if thread.name == "signals"]

    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with terminating():
        (thread,) = watching()
    thread.join(5)
    assert watching() == []
    assert signal.set_wakeup_fd(before) == before


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="Windows has no SIGBUS")
def test_a_mapped_file_that_shrinks_ends_a_command_with_one_line(tmp_path):
    """Also within numpy, on a thread, and while another thread waits in a call."""
    script = """
import os, sys, threading, time
import numpy as np
from tinyllama.cli.arguments import exit_code

def command():
    with open("numbers", "wb") as file:
        file.write(bytes(1 << 20))
    mapped = np.memmap("numbers", np.uint16, mode="r")
    os.truncate("numbers", 0)
    if sys.argv[1] == "here":
        mapped.sum()
    else:
        threading.Thread(target=mapped.copy).start()
        time.sleep(20)

sys.exit(exit_code(command, "name"))
"""
    for where in ("here", "on a thread"):
        ended = subprocess.run(
            [sys.executable, "-c", script, where],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=15,
        )
        assert ended.returncode == 2, ended
        assert ended.stderr == (
            "a file that is being read was shortened, or its disk fails (SIGBUS)\n"
        )
