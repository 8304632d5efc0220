"""What the tests of whole runs share: a tiny configuration on real text, and training processes."""

import atexit
import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tinyllama.cli.app import main
from tinyllama.config import Config, config_from_toml
from tinyllama.observe.metrics import read_metrics
from tinyllama.system import device, partials
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer
from tinyllama.train.checkpoint import list_checkpoints
from tinyllama.train.trainer import Outcome, Trainer

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(os.__file__).parent
# A few steps an epoch: small files of Python's own library.
TRAIN_FILES = [str(STDLIB / name) for name in ("this.py", "keyword.py", "sched.py")]
VAL_FILES = [str(STDLIB / "bisect.py")]
VOCABULARY = 400


@functools.cache
def shared_folder() -> Path:
    """A folder for what all tests of this process may share; removed at the end."""
    folder = tempfile.mkdtemp(prefix="tinyllama-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def tokenizer() -> Tokenizer:
    texts = [Path(name).read_text() for name in TRAIN_FILES]
    return train_tokenizer(texts, VOCABULARY, shared_folder() / "tokenizer.model")


def toml(run: Path) -> str:
    """The tiny configuration: 64 wide, 2 layers, some 10 steps an epoch, 2 epochs."""
    tokenizer()
    return f"""
[model]
vocab_size = {VOCABULARY}
hidden_size = 64
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 128
max_seq_len = 48

[training]
learning_rate = 1e-2
batch_size = 12
num_epochs = 2
seed = 3

[lr_schedule]
warmup_steps = 4
min_lr = 1e-4

[data]
train_path = {TRAIN_FILES!r}
context_length = 48
tokenizer = {str(shared_folder() / "tokenizer.model")!r}
cache_dir = {str(shared_folder() / "cache")!r}

[checkpointing]
save_every = 1000
checkpoint_dir = {str(run)!r}
keep_last_n = 1000
"""


def configuration(run: Path, *overrides: str) -> Config:
    return config_from_toml(toml(run), "tiny.toml", overrides)


def config_file(run: Path) -> Path:
    """The same as a file, beside the run's folder."""
    file = run.with_name("tiny.toml")
    file.write_text(toml(run))
    return file


def trainer(config: Config, **options) -> Trainer:
    return Trainer(config, show=False, **options)


def train(config: Config, **options) -> Outcome:
    return trainer(config, **options).run()


@functools.cache
def finished_run() -> Path:
    """The folder of a run of both epochs that kept every step, with its validation losses."""
    run = shared_folder() / "finished"
    train(configuration(run, "checkpointing.save_every=1", f"data.val_path={VAL_FILES!r}"))
    return run


def steps_per_epoch() -> int:
    return trainer(configuration(shared_folder() / "unused")).batches.steps_per_epoch


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """The lines of a run's metrics by step; each step must be there once."""
    lines = read_metrics(run / "metrics.jsonl")
    found = {line["step"]: line for line in lines}
    assert len(found) == len(lines), "a step is written twice"
    return found


def numbers(run: Path) -> dict[int, dict[str, float]]:
    """The same without what depends on the machine."""
    free = ("tokens_per_second", "memory_bytes")
    return {
        step: {key: value for key, value in line.items() if key not in free}
        for step, line in metrics(run).items()
    }


def left_behind(parent: Path, name: str) -> Path:
    """The name of what a killed process of this boot left, half-written, in place of `name`."""
    owner = f"999999999-{partials._boot()}-{partials._namespace()}-0123abcd"
    return parent / f".{name}.partial-{owner}"


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def cli(*words: object) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def environment(**variables: str) -> dict[str, str]:
    """For a process of its own: this package, and the CPU unless `variables` say otherwise."""
    devices = {"DEV", "GPU", *device.FLAGS}
    kept = {name: value for name, value in os.environ.items() if name not in devices}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = {} if devices & set(variables) else {"DEV": "CPU"}
    return {**kept, **chosen, "PYTHONPATH": path, **variables}


def printed(*words: object, **variables: str) -> str:
    """What `python WORDS` prints, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**variables))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed_json(*words: object, **variables: str) -> Any:
    """The last line of that, which is JSON."""
    return json.loads(printed(*words, **variables).splitlines()[-1])


def start(*words: object, **variables: str) -> "subprocess.Popen[str]":
    """`python -m tinyllama.WORDS` in a process of its own."""
    first, *rest = map(str, words)
    return subprocess.Popen(
        [sys.executable, "-m", f"tinyllama.{first}", *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )


def run_command(*words: object, **variables: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m tinyllama.WORDS`."""
    process = start(*words, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@functools.cache
def answering() -> list[str]:
    """The backends that `python -m tinyllama.backends` finds here."""
    code, out, err = run_command("backends")
    assert code == 0, err
    return [line.split()[0] for line in out.splitlines() if "not available" not in line]


def wait_for_steps(process: "subprocess.Popen[str]", run: Path, count: int) -> None:
    """Wait until a training process has written the metrics of `count` steps."""
    file = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.02)


def stop(process: "subprocess.Popen[str]", number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal; exit code, output and errors of how the process ends."""
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def tool(name, *arguments, capsys):
    """Exit code, standard output and standard error of a tool."""
    main = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err
