"""The GPU kernels' texts as OpenCL under oclgrind, which reports data races: `make gpu-races`.

The name of this file keeps it out of a run of all tests: it needs another package, and two minutes.
oclgrind interprets each instruction, so sizes are small.
"""

import os
import subprocess
import sys
from pathlib import Path

import gpu_kernels
import pytest
from gpu_rows import CASES
from runs_helpers import ROOT, environment

DRIVER = os.environ.get("OCLGRIND", "/usr/lib/oclgrind/liboclgrind-rt-icd.so")
SCRIPT = """
import gpu_kernels
import gpu_rows
from gpu_on_opencl import run
from tinyllama.ops.gpu.gemm import Packed
"""
RUN = 'print("largest error", '
PRODUCTS = {
    "NT float32": '"NT", 37, 40, 72, accumulate=True, addend=True',
    "NN bfloat16": '"NN", 37, 40, 72, "bfloat16"',
    "TN float16": '"TN", 40, 72, 37, "float16"',
    "TN float32, split": '"TN", 16, 72, 100, split=2',
    "NT, 4 bits": '"NT", 37, 40, 64, "bfloat16", packed=Packed(4, 64)',
    "NN, 8 bits, minimum": '"NN", 37, 64, 72, "float16", packed=Packed(8, 32, True)',
}
TOGETHER = (
    "a sum of three", "three turned", "gate and up, float32", "their gradients",
    "two of one B, split",
)  # fmt: skip
ATTENTION = {
    "float32, D 32": '1, 50, 2, 1, 32, "float32", (20,)',
    "bfloat16, D 48, turned back": '1, 50, 2, 1, 48, "bfloat16", (20,), turned=True',
    "float16, D 64": '1, 40, 1, 1, 64, "float16"',
}


def under_oclgrind(code: str) -> tuple[float, str]:
    """The largest error that the code prints, and what oclgrind reports."""
    helpers = Path(gpu_kernels.__file__).parent
    variables = {"OCL_ICD_VENDORS": DRIVER, "OCLGRIND_DATA_RACES": "1", "DEV": "CL"}
    env = environment(PYTHONPATH=f"{ROOT}:{helpers}", **variables)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("largest error")[1]), done.stdout + done.stderr


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_has_no_data_race(name: str) -> None:
    code = f'{RUN}gpu_kernels.product_error(run, "opencl", {PRODUCTS[name]}))'
    error, report = under_oclgrind(code)
    assert "race" not in report, report[:2000]
    assert error <= 1e-6


@pytest.mark.parametrize("name", TOGETHER)
def test_several_products_have_no_data_race(name: str) -> None:
    case = {**gpu_kernels.TOGETHER[name], "M": 40, "K": 36, "dtype": "float32"}
    errors = f'gpu_kernels.together_errors(run, "opencl", **{case})'
    error, report = under_oclgrind(f"{RUN}max({errors}.values()))")
    assert "race" not in report, report[:2000]
    assert error <= 1e-6


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_no_data_race(name: str) -> None:
    found = f'gpu_kernels.attention_errors(run, "opencl", {ATTENTION[name]})'
    error, report = under_oclgrind(f"{RUN}max({found}.values()))")
    assert "race" not in report, report[:2000]
    assert error <= gpu_kernels.ATTENTION_ERROR[name.split(",")[0]]


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_of_rows_has_no_data_race(name: str) -> None:
    code = f'found = gpu_rows.CASES[{name!r}](run, "opencl", gpu_rows.same)\n'
    error, report = under_oclgrind(f'{code}print("largest error", len(found))')
    assert "race" not in report, report[:2000]
    assert error == 0


def test_a_missing_barrier_is_reported() -> None:
    change = 'lambda text: text.replace("BARRIER; /* the tile is", "; /*")'
    code = f'{RUN}gpu_kernels.product_error(run, "opencl", "NT", 37, 40, 72, change={change}))'
    assert "data race" in under_oclgrind(code)[1]
