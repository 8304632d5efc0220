"""Real text for a benchmark: token rows that every contender trains on.

The configured text and tokenizer if both exist; otherwise the source of Python's standard
library, one id per byte, which needs neither a download nor a tokenizer.
"""

import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyllama.config import Config
from tinyllama.data.batches import prepare
from tinyllama.tokenizers.opening import open_tokenizer

Rows = NDArray[np.int32]


def batches(config: Config, steps: int, batch: int, context: int) -> tuple[Rows, str]:
    """Rows (steps, batch, context + 1) int32, and a description of them.

    Raises DataError or TokenizerError if a configured text or tokenizer cannot be read.
    """
    needed = steps * batch * (context + 1)
    if config.tokenizer_source != "train" and _has_text(config):
        tokens, name = _configured(config, needed)
    else:
        tokens = _library_bytes(needed) % config.model.vocab_size
        name = "source of Python's standard library, one id per byte"
    # A text shorter than the run is read again from its start.
    return np.resize(tokens, (steps, batch, context + 1)).astype(np.int32), name


def _has_text(config: Config) -> bool:
    """Whether data.train_path names files that exist."""
    patterns = config.data.train_path
    paths = [patterns] if isinstance(patterns, str) else list(patterns)
    return any(Path(path).exists() for path in paths)


def _configured(config: Config, needed: int) -> tuple[NDArray[np.int64], str]:
    tokenizer = open_tokenizer(config.tokenizer_source)
    patterns = config.data.train_path
    paths = [patterns] if isinstance(patterns, str) else list(patterns)
    data = config.data
    dataset = prepare(
        paths, tokenizer, data.cache_dir, special_tokens=data.special_tokens, progress=False
    )
    return np.asarray(
        dataset.tokens[:needed], np.int64
    ), f"{dataset.name}, {dataset.n_tokens} tokens"


def _library_bytes(needed: int) -> NDArray[np.int64]:
    """UTF-8 bytes of the standard library's modules, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= needed:
            break
    return np.frombuffer(bytes(text[:needed]), np.uint8).astype(np.int64)
