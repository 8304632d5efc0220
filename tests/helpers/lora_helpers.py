"""What the tests of adapters share: a base in a folder, adapters with something in them, a run."""

import numpy as np
from data_helpers import LINE, small_tokenizer
from model_helpers import SQUARE, random_weights
from tinygrad import dtypes

from tinyllama.config import LlamaConfig, config_from_toml
from tinyllama.formats.huggingface import open_folder, save_folder
from tinyllama.formats.peft import AdapterConfig, Placement
from tinyllama.model.int4 import packed_linears, read_packed
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.model.lora import adapter_tensors, attach
from tinyllama.runtime.storage import write

BASE = LlamaConfig(**{**SQUARE.__dict__, "vocab_size": 300})


def write_base(folder, config=BASE, seed=0, dtype="float32", max_shard_bytes=5_000_000_000):
    """A Hugging Face folder with random weights and, where it fits, a tokenizer."""
    tokenizer = small_tokenizer()
    fits = tokenizer.vocab_size <= config.vocab_size
    save_folder(
        folder,
        config,
        random_weights(config, seed),
        dtype=dtype,
        files={"tokenizer.model": tokenizer.model} if fits else {},
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        max_shard_bytes=max_shard_bytes,
    )
    return folder


def load_packed(folder, block_size, dtype=dtypes.float32):
    """The model of a folder with its linear layers in 4 bits."""
    opened = open_folder(folder)
    model = packed_linears(Llama(opened.config, dtype=dtype, seed=None), block_size)
    read_packed(model, opened)
    return model


def placed_on(model, names, rank=3, alpha=6.0):
    """The same placement on every layer with one of these names."""
    paths = (path for path, _, name in block_linears(model.model.layers) if name in names)
    return dict.fromkeys(paths, Placement(rank, alpha))


def randomize(model, seed=1, size=0.3):
    """Adapters as after a training: B is not zero."""
    rng = np.random.default_rng(seed)
    for tensor in adapter_tensors(model).values():
        write(tensor, (size * rng.standard_normal(tensor.shape)).astype(np.float32))


def with_adapters(model, placed, seed=1, **options):
    """Attach adapters that hold random numbers; returns their configuration."""
    config = AdapterConfig(placed, **options)
    attach(model, config, seed)
    randomize(model, seed)
    return config


def run_config(folder, base, *overrides):
    """A short LoRA run with dropout and accumulation on the text of `write_text`."""
    text = f"""
        [model]
        base = "{base}"
        [training]
        learning_rate = 1e-2
        batch_size = 4
        micro_batch_size = 2
        max_steps = 4
        seed = 3
        [data]
        train_path = "{folder}/train.txt"
        context_length = 32
        cache_dir = "{folder}/cache"
        [checkpointing]
        save_every = 2
        checkpoint_dir = "{folder}/run"
        [lora]
        rank = 4
        alpha = 8.0
        dropout = 0.25
        target_modules = ["q_proj", "v_proj"]
    """
    return config_from_toml(text, "test.toml", overrides)


def write_text(folder):
    (folder / "train.txt").write_text(LINE * 400)
