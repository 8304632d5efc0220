"""The same seed trains alike on the processor's own kernels and on each GPU backend that is here.

In CI that is OpenCL (pocl, on the processor); with a card, CUDA, NV, Metal or AMD too.
"""

import ctypes.util
import functools
import json
import re
import subprocess
import sys

import pytest
from runs_helpers import (
    VAL_FILES,
    answering,
    config_file,
    environment,
    finished_run,
    metrics,
    numbers,
    run_command,
)

from tinyllama.formats.safetensors import SafetensorsFile
from tinyllama.system import device

STEPS = 20
# The smallest model in which everything acts: grouped queries, two documents a row, targets that
# are not trained. pocl takes about a second to compile a kernel, so layers are equal and small.
SCRIPT = """
from tinyllama.system import device
choice = device.select()
print(choice.line())
import numpy as np
from tinyllama.config import LlamaConfig, TrainingConfig
from tinyllama.data.batches import Batch
from tinyllama.model.llama import Llama
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

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


def said(*words, **variables):
    """What a command prints; it must not fail."""
    code, out, err = run_command(*words, **variables)
    assert code == 0, err
    return out


def test_opencl_answers_where_it_is_installed():
    """So that it does not drop out of these tests unnoticed."""
    assert ("CL" in answering()) == (ctypes.util.find_library("OpenCL") is not None)


@pytest.fixture(params=["CL", "CUDA", "NV", "METAL", "AMD"])
def gpu(request):
    if request.param not in answering():
        pytest.skip(f"no {request.param} here; it needs {device.INSTALL[request.param]}")
    return request.param


def lines(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@functools.cache
def on_the_processor():
    return lines(SCRIPT.replace("STEPS", str(STEPS)), CPU="1")


def test_twenty_steps_have_the_same_losses_as_on_the_processor(gpu):
    first, *there = lines(SCRIPT.replace("STEPS", str(STEPS)), **{gpu: "1"})
    assert first.startswith(f"backend {gpu}, ") and first.endswith(f" ({gpu}=1)")
    assert gpu != "CL" or first.endswith("renderer OpenCL (CL=1)")
    first, *processor = on_the_processor()
    assert first.startswith("backend CPU, ") and first.endswith("renderer ClangJIT (CPU=1)")
    assert len(there) == len(processor) == STEPS
    for ours, theirs in zip(there, processor, strict=True):
        found, expected = (list(map(float, line.split())) for line in (ours, theirs))
        assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-4)  # the loss
        assert found[1:] == pytest.approx(expected[1:], rel=1e-3)  # the gradient's norm, tokens
    last = float(there[-1].split()[0])
    assert last < float(there[0].split()[0]) - 0.1  # it trains


CHOICE = "from tinyllama.system import device; print(device.select().line())"


def test_gpu_takes_the_fastest_gpu():
    best = next((name for name in device.GPU_ORDER if name in answering()), None)
    if best is None or device._open(best, "a test").is_opencl_processor:
        pytest.skip("no GPU here")
    (line,) = lines(CHOICE, GPU="1")
    assert line.startswith(f"backend {best}, ") and line.endswith("(GPU=1: the fastest available)")


def test_gpu_does_not_fall_back_to_opencl_on_the_processor(tmp_path):
    if set(answering()) - {"CPU", "CL"} or "CL" not in answering():
        pytest.skip("needs OpenCL on the processor, and no GPU")
    code, out, err = run_command("train", config_file(tmp_path / "run"), GPU="1")
    assert (code, out) == (2, "")
    assert err.startswith("GPU=1: no GPU works here (tried METAL, CUDA, NV, AMD, CL). Available: ")
    assert "CL, CPU (CL is OpenCL on the processor; to use it, set CL=1). " in err
    assert len(err.splitlines()) == 1
    (line,) = lines(CHOICE, CL="1")
    assert line.startswith("backend CL, ") and line.endswith("(CL=1)")


def test_a_run_may_take_what_the_driver_says_the_device_has(gpu):
    code = (
        "from tinyllama.system import device, memory; device.select(); print(memory.free_bytes())"
    )
    (there,), (processor,) = lines(code, **{gpu: "1"}), lines(code, CPU="1")
    if gpu == "CL":
        assert 0.2 * int(processor) < int(there) < 1 << 50
    elif gpu == "CUDA":
        assert 1 << 30 < int(there) < 1 << 40
    else:
        assert there == "None"


def test_weights_are_read_and_written_unchanged(gpu, tmp_path):
    source = finished_run() / "final"
    code = f"""
from tinyllama.system import device
device.select()
from tinyllama.model.llama import Llama
Llama.from_pretrained({str(source)!r}).save_pretrained({str(tmp_path / "copy")!r})
"""
    lines(code, **{gpu: "1"})
    first, second = (
        SafetensorsFile(folder / "model.safetensors") for folder in (source, tmp_path / "copy")
    )
    for name in first.names:
        assert (first.float32(name) == second.float32(name)).all()


def test_the_commands_do_there_what_they_do_on_the_processor(gpu, tmp_path):
    on_gpu, run = {gpu: "1"}, tmp_path / "run"
    words = ("train", config_file(run), "--set", "training.max_steps=6")
    out = said(*words, "--set", "checkpointing.save_every=3", **on_gpu)
    assert out.startswith(f"backend {gpu}, ") and "finished: step 6" in out
    never_stopped = numbers(run)
    total = re.search(r"^total +([\d,]+) ", out, re.MULTILINE)
    assert total is not None
    estimated, used = int(total[1].replace(",", "")), metrics(run)[6]["memory_bytes"]
    assert used == pytest.approx(estimated, rel=0.01)
    said(*words, "--resume", run / "step-00000003", **on_gpu)
    assert numbers(run) == never_stopped  # bit for bit
    measure = ("evaluate", "--model", run / "final", "--data", VAL_FILES[0])
    there, here = (json.loads(said(*measure, **on)) for on in (on_gpu, {"CPU": "1"}))
    assert there == pytest.approx(here, rel=1e-5)
    write = ("generate", "--model", run / "final", "--prompt", "def ", "--temperature", "0")
    write = (*write, "--max-new-tokens", "8")
    assert said(*write, **on_gpu) == said(*write, CPU="1") != "def \n"
