"""Training by the GPU kernels (ops/gpu/) on each GPU backend that is here, beside the processor.

In CI that is OpenCL on the processor, where TINYLLAMA_KERNELS=all makes a run take them. Sizes are
few, since pocl takes some seconds to compile a kernel.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs_helpers import (
    answering,
    config_file,
    environment,
    metrics,
    numbers,
    run_command,
    shared_folder,
)

STEPS = 20
# Grouped queries, several documents in a row, rows of an odd length.
SIZES = (
    "model.num_heads=2", "model.num_kv_heads=1", "model.intermediate_size=64",
    "data.context_length=31", "training.batch_size=4", "training.num_epochs=4",
    f"training.max_steps={STEPS}", "checkpointing.save_every=10",
)  # fmt: skip
LORA = ("lora.rank=8", "lora.dropout=0.1", "training.learning_rate=1e-2")
# Numbers that no row of 16 bytes divides, and heads that attention's kernels do not take.
ODD = (
    "model.hidden_size=54", "model.num_heads=3", "model.num_kv_heads=3", "model.num_layers=1",
    "model.intermediate_size=91",
)  # fmt: skip
CASES = {"full": (), "lora": LORA, "qlora": (*LORA, "qlora.block_size=32"), "odd": ODD}
# Products read copies of the weights; the optimizer's state is rounded by random bits.
NARROW = ("training.dtype=bfloat16", "training.optimizer_state=bfloat16", "model.num_layers=1")


@pytest.fixture(params=["CL", "CUDA", "METAL"])
def gpu(request):
    if request.param not in answering():
        pytest.skip(f"no {request.param} here")
    return request.param


def overrides(case: str) -> list[str]:
    values = [*SIZES, *(NARROW if case == "narrow" else CASES[case])]
    if "lora" in case:
        base = trained("full", "CPU")[0] / "final"
        values += [f"model.base={base}", f"data.tokenizer={base}"]
    return [word for value in values for word in ("--set", value)]


def variables(place: str) -> dict[str, str]:
    return {place: "1", "TINYLLAMA_KERNELS": "all"}


@functools.cache
def trained(case: str, place: str) -> tuple[Path, str]:
    """The folder of a run of STEPS steps, and what it printed."""
    run = shared_folder() / f"{case}-{place}"
    options = overrides(case)  # which may train a base first, and write another configuration
    code, out, err = run_command("train", config_file(run), *options, **variables(place))
    assert code == 0, err
    return run, out


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_have_the_same_losses_as_on_the_processor(gpu, case):
    there, here = (metrics(trained(case, place)[0]) for place in (gpu, "CPU"))
    assert len(there) == len(here) == STEPS
    for step in here:
        assert there[step]["loss"] == pytest.approx(here[step]["loss"], rel=0, abs=1e-4)
        # AdamW takes steps of one size for gradients of any: an adapter's first ones are near zero.
        # Later, steps with large gradients amplify rounding: portable and kernel forms on the
        # processor alone differ by 0.2 % in step 16 of qlora.
        assert there[step]["grad_norm"] == pytest.approx(here[step]["grad_norm"], rel=5e-3)
    assert there[1]["grad_norm"] == pytest.approx(here[1]["grad_norm"], rel=1e-5)
    first, last = (np.mean([here[s]["loss"] for s in steps]) for steps in ((1, 2), (19, 20)))
    assert last < first  # it trains


@pytest.mark.parametrize("case", ["full", "narrow"])
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(gpu, case):
    run, _ = trained(case, gpu)
    never_stopped = numbers(run)
    words = ("train", config_file(run), *overrides(case))
    resume = ("--resume", run / "step-00000010")
    code, _, err = run_command(*words, *resume, **variables(gpu))
    assert code == 0, err
    assert numbers(run) == never_stopped


COPIES = """
from tinyllama.system import device
device.select()
import numpy as np
from tinygrad import dtypes
from tinyllama.config import LlamaConfig, TrainingConfig
from tinyllama.data.batches import Batch
from tinyllama.model.llama import Llama
from tinyllama.train.optimizer import AdamW, weights_to_copy
from tinyllama.train.step import TrainStep

sizes = LlamaConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
seen = []
for copied in (False, True):
    model = Llama(sizes, dtype=dtypes.bfloat16, seed=5)
    names = weights_to_copy(model, model.state_dict()) if copied else []
    assert len(names) == 8 * copied
    config = TrainingConfig(dtype="bfloat16", optimizer_state="bfloat16")
    train = TrainStep(model, AdamW(model.state_dict(), config, copied=names), 1)
    tokens = np.random.default_rng(1).integers(0, 64, (2, 16)).astype(np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.zeros_like(tokens))
    results = [train([batch], step, 1e-2) for step in (1, 2, 3)]
    seen.append([(result.loss, result.grad_norm) for result in results])
print(seen[0] == seen[1], seen[0][2][0] < seen[0][0][0])
"""


def test_copies_of_weights_change_no_bit(gpu):
    env = environment(**variables(gpu))
    done = subprocess.run([sys.executable, "-c", COPIES], capture_output=True, text=True, env=env)
    assert (done.stdout.splitlines()[-1:], done.returncode) == (["True True"], 0), done.stderr


CHOSEN = """
import os
from tinyllama.system import device
device.select()
from tinygrad import Tensor
from tinyllama.ops import forms
print(forms.chosen(Tensor.empty(3)), os.environ.get("POCL_MAX_PTHREAD_COUNT"))
"""


@pytest.mark.parametrize(
    ("kernels", "expected"), [("1", "portable None"), ("all", "gpu 1"), ("0", "portable None")]
)
def test_opencl_on_the_processor_is_portable_unless_kernels_are_forced(kernels, expected):
    """Where its driver, pocl 3.1, must run our kernels on a single thread."""
    if "CL" not in answering():
        pytest.skip("no OpenCL here")
    env = environment(CL="1", TINYLLAMA_KERNELS=kernels)
    env.pop("POCL_MAX_PTHREAD_COUNT", None)
    done = subprocess.run([sys.executable, "-c", CHOSEN], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


@pytest.mark.parametrize("case", ["full", "qlora", "narrow"])
def test_the_memory_in_use_is_the_estimate(gpu, case):
    run, out = trained(case, gpu)
    total = re.search(r"^total +([\d,]+) ", out, re.MULTILINE)
    assert total is not None
    estimated = int(total[1].replace(",", ""))
    assert metrics(run)[STEPS]["memory_bytes"] == pytest.approx(estimated, rel=0.01)
