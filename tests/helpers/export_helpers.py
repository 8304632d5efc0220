"""What the tests of exports share: a base with a tokenizer, and GGUF files read by others."""

import functools

import gguf
import numpy as np
from gguf_helpers import gguf_name, to_pairs
from model_helpers import random_weights
from runs_helpers import tokenizer

from tinyllama.config import LlamaConfig
from tinyllama.formats.huggingface import save_folder

# More rows than the tokenizer has pieces; as many heads as differ from those of the keys.
CONFIG = LlamaConfig(
    vocab_size=416,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=128,
    max_seq_len=96,
    rope_theta=5000.0,
    rms_norm_eps=1e-4,
)


def write_model(folder, config=CONFIG, dtype="float32", files=None, seed=0):
    """A Hugging Face folder with random weights and a trained tokenizer; returns the weights."""
    weights = random_weights(config, seed)
    trained = tokenizer()
    save_folder(
        folder,
        config,
        weights,
        dtype=dtype,
        files=trained.files if files is None else files,
        bos_id=trained.bos_id,
        eos_id=trained.eos_id,
    )
    return weights


@functools.cache
def _reader(path):
    return gguf.GGUFReader(path)


def fields_of(path):
    """The metadata of a file, as the gguf library reads it."""
    return {key: field.contents() for key, field in _reader(path).fields.items()}


def tensors_of(path):
    """Name -> (type, float32 values in the file's order), as the gguf library reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in _reader(path).tensors
    }


def in_gguf_order(name, weight, config=CONFIG):
    """A weight with its rows as INTEROP's formula has them."""
    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    return weight if heads is None else to_pairs(weight, heads)


def relative(found, expected):
    """Root mean square of the difference over that of what was expected."""
    away = np.asarray(found, np.float64) - expected
    return float(np.sqrt((away**2).mean() / (np.asarray(expected, np.float64) ** 2).mean()))


__all__ = [
    "CONFIG",
    "fields_of",
    "gguf_name",
    "in_gguf_order",
    "relative",
    "tensors_of",
    "write_model",
]
