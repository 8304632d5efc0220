"""The GPU kernels' texts as OpenCL, executed by the machine's driver, against float64."""

import ctypes.util
import json
import subprocess
import sys
from pathlib import Path

import gpu_kernels
import pytest
from gpu_kernels import ATTENTION, PRODUCTS
from runs_helpers import ROOT, environment

# tests/train/test_gpu.py holds that OpenCL answers where its library is.
pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("OpenCL") is None, reason="OpenCL is missing: tools/system.sh opencl"
)
HELPERS = Path(gpu_kernels.__file__).parent


def on_opencl(*words: str) -> dict:
    """What gpu_on_opencl.py prints. One thread: with two, pocl 3.1 gives random results."""
    paths = f"{ROOT}:{HELPERS}"
    env = environment(DEV="CL", POCL_MAX_PTHREAD_COUNT="1", PYTHONPATH=paths)
    command = [sys.executable, str(HELPERS / "gpu_on_opencl.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_products() -> None:
    found = on_opencl("product", *PRODUCTS)
    assert set(found) == set(PRODUCTS)
    wrong = {n: x for n, x in found.items() if not x <= gpu_kernels.allowed_product_error(n)}
    assert wrong == {}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    assert on_opencl("attention", name) == {name: {}}
