"""A benchmark small enough for tests."""

from pathlib import Path

import numpy as np

from tinyllama.bench import benchmark as command
from tinyllama.bench import text
from tinyllama.bench.protocol import Spec
from tinyllama.config import Config

SMALL = {
    "model.vocab_size": 300,
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.intermediate_size": 96,
    "data.context_length": 32,
    "training.batch_size": 2,
}
SMALL_OPTIONS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


def resolved(*words: str) -> Config:
    """The configuration that these words of the command line ask for."""
    return command.resolve(command.parser().parse_args(["configs/124m.toml", *words]))


def small_spec(folder: Path) -> Spec:
    """What the workers of a small benchmark are to do; its data is written to `folder`."""
    options = command.parser().parse_args(["configs/124m.toml", *SMALL_OPTIONS])
    config = command.resolve(options)
    rows, _ = text.batches(config, 5, 2, 32)
    np.save(folder / "tokens.npy", rows)
    return command.make_spec(config, options, folder / "tokens.npy")
