"""A tiny model with a chat template, an adapter of it, and servers of them in real processes."""

import functools
import json
import select
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
from lora_helpers import placed_on, with_adapters
from model_helpers import random_weights
from runs_helpers import environment, shared_folder
from tokenizers_helpers import CHATML_CONFIG, byte_level

from tinyllama.config import LlamaConfig
from tinyllama.formats.huggingface import EMBEDDING, save_folder
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import fingerprint
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.build import load_model
from tinyllama.model.lora import write_adapter
from tinyllama.tokenizers.opening import open_tokenizer

CONTEXT = 4096
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = LlamaConfig(
    vocab_size=1200,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    max_seq_len=CONTEXT,
)


@functools.cache
def chat_model():
    """The folder of a model of random weights that never ends an answer by itself."""
    folder = shared_folder() / "tiny-chat"
    config = json.dumps({**CHATML_CONFIG, "chat_template": TEMPLATE}).encode()
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": config}
    weights = random_weights(CHAT)
    weights["lm_head.weight"] *= 3
    tokens = json.loads(byte_level())["added_tokens"]
    for token in tokens:  # their logits stay near zero, far from the largest of 1200
        weights["lm_head.weight"][token["id"]] *= 0
    assert weights[EMBEDDING].shape[0] == 1200
    folder.mkdir()
    save_folder(folder, CHAT, weights, dtype="float32", files=files, bos_id=1, eos_id=2)
    return folder


@functools.cache
def adapter_folder():
    """An adapter of `chat_model` that changes what it says."""
    folder = shared_folder() / "tiny-adapter"
    folder.mkdir()
    model = load_model(chat_model())
    base = {"base": str(chat_model()), "base_fingerprint": fingerprint(open_model(chat_model()))}
    config = with_adapters(model, placed_on(model, ("q_proj", "v_proj")), **base)
    write_adapter(folder, model, config)
    return folder


@functools.cache
def chat_tokenizer():
    return open_tokenizer(chat_model())


def prompt_text(*turns, system=None):
    """What the template makes of turns, by hand: user, assistant, user, ..."""
    given = [("system", system)] if system else []
    given += [(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in given)
    return f"{text}<|im_start|>assistant\n"


@functools.cache
def reference(folder):
    """Greedy ids after a text, from the model of a folder; nothing is kept between texts."""
    model = load_model(folder)

    def answer(text, count):
        ids = chat_tokenizer().encode(text, special=True)
        generator = Generator(model, vocabulary=chat_tokenizer().vocab_size)
        return list(generator.tokens(ids, count, Sampling(temperature=0)))

    return answer


def answer_text(text, count, folder=None):
    """The greedy answer to a text, as `reference` has it."""
    return chat_tokenizer().decode(reference(folder or chat_model())(text, count))


@contextmanager
def served(*words, model=None):
    """The address of `tinyllama serve` in a process of its own, and the process."""
    command = [sys.executable, "-m", "tinyllama", "serve", str(model or chat_model())]
    process = subprocess.Popen(
        [*command, "--port", "0", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield _address(process), process
    finally:
        process.kill()
        process.communicate()


def _address(process):
    assert process.stdout is not None
    deadline = time.monotonic() + 300  # it compiles first
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.2)[0]:
            line = process.stdout.readline()
            assert line.startswith("serving "), (line, process.communicate())
            return line.rsplit(" at ", 1)[1].strip()
        assert process.poll() is None, process.communicate()
    raise AssertionError("the server does not start")


def no_repeats(ids):
    """Whether ids are many different ones, and so prove something."""
    return len(np.unique(ids)) > len(ids) // 3
