"""What the tests of whole runs share: a tiny configuration on real text, and training processes."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinyllama.checkpoint import list_checkpoints
from tinyllama.config import Config, config_from_toml
from tinyllama.metrics import read_metrics
from tinyllama.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tinyllama.train import Outcome, Trainer

ROOT = Path(__file__).resolve().parents[1]
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
batch_size = 6
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


def config_file(run: Path, name: str = "tiny.toml") -> Path:
    """The same as a file, beside the run's folder."""
    file = run.parent / name
    file.write_text(toml(run))
    return file


def train(config: Config, **options: object) -> Outcome:
    return Trainer(config, show=False, **options).run()  # type: ignore[arg-type]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; every step is there once."""
    lines = read_metrics(run / "metrics.jsonl")
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is written twice"
    return found


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def environment(**variables: str) -> dict[str, str]:
    """For a process of its own: this package, the CPU unless told otherwise."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {name: value for name, value in os.environ.items() if name != "DEV"}
    chosen = {} if set(variables) & {"DEV", "CPU", "CL", "GPU", "METAL", "CUDA"} else {"DEV": "CPU"}
    return {**found, **chosen, "PYTHONPATH": path, **variables}


def command(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m tinyllama.WORDS` in a process of its own."""
    first, *rest = map(str, words)
    return subprocess.run(
        [sys.executable, "-m", f"tinyllama.{first}", *rest],
        capture_output=True, text=True, env=environment(**variables), timeout=300,
    )  # fmt: skip


def saved_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
