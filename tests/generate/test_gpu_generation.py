"""Generation by the GPU kernels on each GPU backend that is here, beside the processor."""

import functools
import json
import subprocess
import sys

import pytest
from runs_helpers import answering, environment

# Longer than a part of the cache that a block reads. The packed layers are in groups of 32.
SCRIPT = """
import json, sys
from tinyllama.system import device
device.select()
import numpy as np
from tinyllama.config import LlamaConfig
from tinyllama.formats.int4 import quantize_rows
from tinyllama.generate.generator import Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.model.int4 import packed_linears
from tinyllama.model.llama import Llama
from tinyllama.runtime.storage import read, write

sizes = dict(vocab_size=301, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
config = LlamaConfig(**sizes, intermediate_size=96, max_seq_len=160)
model, packed = Llama(config, seed=None), packed_linears(Llama(config, seed=None), 32)
random, halves = np.random.default_rng(3), packed.state_dict()
for name, tensor in model.state_dict().items():
    values = random.standard_normal(tensor.shape).astype(np.float32)
    write(tensor, values)
    path = name.removesuffix("weight")
    if f"{path}packed" in halves:
        numbers, scales = quantize_rows(values, 32)
        write(halves[f"{path}packed"], numbers)
        write(halves[f"{path}scales"], scales)
    elif "norm" in name:
        write(halves[name], values)
    else:
        write(halves[name], (values.view(np.uint32) >> 16).astype(np.uint16))
prompt, found = list(range(1, 120)), []
for kind in (model, packed):
    tokens = Generator(kind).tokens(prompt, 24, Sampling(temperature=0, seed=0))
    found.append(list(tokens))
print(json.dumps(found))
"""


@pytest.fixture(params=["CL", "CUDA", "METAL"])
def gpu(request):
    if request.param not in answering():
        pytest.skip(f"no {request.param} here")
    return request.param


@functools.cache
def generated(place: str) -> list[list[int]]:
    """What a model and the same in 4 bits generate."""
    env = environment(**{place: "1", "TINYLLAMA_KERNELS": "all"})
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_tokens_as_on_the_processor(gpu):
    here = generated("CPU")
    assert all(len(set(tokens)) > 5 for tokens in here)
    assert generated(gpu) == here
