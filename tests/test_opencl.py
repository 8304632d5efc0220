"""The same seed trains alike on the processor's own kernels and on OpenCL (pocl in CI)."""

import ctypes.util
import subprocess
import sys

import pytest
from runs_helpers import environment, finished_run

from tinyllama.weights.safetensors import SafetensorsFile

STEPS = 20
# The smallest model in which everything acts: grouped queries, two documents a row, targets that
# are not trained. pocl takes about a second to compile a kernel, so layers are equal and small.
SCRIPT = """
from tinyllama import device
choice = device.select()
print(choice.line())
import numpy as np
from tinyllama.config import LlamaConfig, TrainingConfig
from tinyllama.data import Batch
from tinyllama.model import Llama
from tinyllama.optim import AdamW
from tinyllama.step import TrainStep

sizes = dict(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1)
model = Llama(LlamaConfig(**sizes, intermediate_size=32, max_seq_len=16), seed=5)
optimizer = AdamW(model.state_dict(), TrainingConfig(learning_rate=1e-2))
train = TrainStep(model, optimizer, 1)
random = np.random.default_rng(1)
for step in range(1, STEPS + 1):
    tokens = random.integers(0, 300, (2, 16)).astype(np.int32)
    targets, starts = (tokens * 7 + 1) % 300, np.zeros_like(tokens)
    targets[1, 9], starts[1, 10:] = -1, 10
    result = train([Batch(tokens, targets, starts)], step, 1e-2)
    print(repr(result.loss), repr(result.grad_norm), result.tokens)
"""


@pytest.fixture(scope="module", autouse=True)
def opencl():
    if ctypes.util.find_library("OpenCL") is None:
        pytest.skip("no OpenCL here; `apt-get install pocl-opencl-icd ocl-icd-libopencl1`")


def lines(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_twenty_steps_have_the_same_losses_on_opencl_as_on_the_processor():
    script = SCRIPT.replace("STEPS", str(STEPS))
    first, *opencl = lines(script, CL="1")
    assert first.startswith("backend CL, ") and first.endswith("renderer OpenCL (CL=1)")
    first, *processor = lines(script, CPU="1")
    assert first.startswith("backend CPU, ") and first.endswith("renderer ClangJIT (CPU=1)")
    assert len(opencl) == len(processor) == STEPS
    for ours, theirs in zip(opencl, processor, strict=True):
        found, expected = (list(map(float, line.split())) for line in (ours, theirs))
        assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-4)  # the loss
        assert found[1:] == pytest.approx(expected[1:], rel=1e-3)  # the gradient's norm, tokens
    last = float(opencl[-1].split()[0])
    assert last < float(opencl[0].split()[0]) - 0.1  # it trains


def test_gpu_takes_opencl_where_it_is_the_best_there_is():
    code = "from tinyllama import device; print(device.select().line())"
    (line,) = lines(code, GPU="1")
    assert line.startswith("backend CL, ")
    assert "(GPU=1: no GPU answered, so OpenCL on the processor)" in line


def test_a_run_may_take_what_the_driver_says_the_device_has():
    code = "from tinyllama import device, memory; device.select(); print(memory.free_bytes())"
    (opencl,), (processor,) = lines(code, CL="1"), lines(code, CPU="1")
    assert 0.2 * int(processor) < int(opencl) < 1 << 50


def test_weights_are_read_and_written_unchanged(tmp_path):
    source = finished_run() / "final"
    code = f"""
from tinyllama import device
device.select()
from tinyllama.model import Llama
Llama.from_pretrained({str(source)!r}).save_pretrained({str(tmp_path / "copy")!r})
"""
    lines(code, CL="1")
    first, second = (
        SafetensorsFile(folder / "model.safetensors") for folder in (source, tmp_path / "copy")
    )
    for name in first.names:
        assert (first.float32(name) == second.float32(name)).all()
