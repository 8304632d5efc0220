"""Generation by the GPU kernels on each GPU backend that is here, beside the processor."""

import functools
import json
import subprocess
import sys

import pytest
from runs_helpers import answering, environment

# Longer than a part of the cache that a block reads. The packed layers are in groups of 32; the
# third model has minima too, and a packed embedding, as one of GGUF's Q4_1 has.
SCRIPT = """
import json, re, sys
from tinyllama.system import device
device.select()
import numpy as np
from tinyllama.config import LlamaConfig
from tinyllama.formats.int4 import quantize_rows
from tinyllama.generate.generator import Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.formats.packed import PackedForm
from tinyllama.model.int4 import Int4Embedding, packed_linears
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.runtime import blocks
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
q4_1, form = Llama(config, seed=None), PackedForm(4, 32, True)
linears = [path for path, _, _ in block_linears(q4_1.model.layers)]
packed_linears(q4_1, 32, dict.fromkeys(linears, form))
q4_1.model.embed_tokens = Int4Embedding(config.vocab_size, config.hidden_size, form)
for name, tensor in q4_1.state_dict().items():
    kind = name.rpartition(".")[2]
    values = random.uniform(0.2, 0.5, tensor.shape)
    if kind == "packed":
        values = random.integers(0, 256, tensor.shape).astype(np.uint8)
    elif kind == "minima":
        values = -7.5 * read(q4_1.state_dict()[name.replace("minima", "scales")])
        values = values.astype(np.float16)
    elif kind == "scales":
        values = values.astype(np.float16)
    elif "norm" in name:
        values = random.standard_normal(tensor.shape).astype(np.float32)
    else:
        values = random.standard_normal(tensor.shape).astype(np.float32).view(np.uint32) >> 16
        values = values.astype(np.uint16)
    write(tensor, values)
kernels, run = set(), blocks.run
def recorded(launch, *rest):
    name = re.split("_(?=float|bfloat|[0-9])", launch.name)[0]
    kernels.add(name + " BITS" * ("#define BITS" in launch.text))
    return run(launch, *rest)
blocks.run = recorded
prompt, found = list(range(1, 120)), []
for kind in (model, packed, q4_1):
    tokens = Generator(kind).tokens(prompt, 24, Sampling(temperature=0, seed=0))
    found.append(list(tokens))
print(json.dumps([found, sorted(kernels)]))
"""


@pytest.fixture(params=["CL", "CUDA", "METAL"])
def gpu(request):
    if request.param not in answering():
        pytest.skip(f"no {request.param} here")
    return request.param


@functools.cache
def generated(place: str) -> tuple[list[list[int]], list[str]]:
    """What a model, the same in 4 bits, and one as of GGUF generate, and by which GPU kernels."""
    env = environment(**{place: "1", "TINYLLAMA_KERNELS": "all"})
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_tokens_as_on_the_processor(gpu):
    here, _ = generated("CPU")
    assert all(len(set(tokens)) > 5 for tokens in here)
    assert generated(gpu)[0] == here


def test_tokens_and_the_prompts_chunks_are_computed_by_kernels_also_packed_weights(gpu):
    assert generated("CPU")[1] == []
    # A chunk of the prompt takes products of many rows, a token those of one.
    chunk = {"gemm_nt", "gemm_nt BITS", "rms_norm_forward", "rope", "swiglu"}
    token = {"few_rows", "few_rows BITS", "cached_attention"}
    assert set(generated(gpu)[1]) >= token | chunk
