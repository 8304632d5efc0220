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

from tinyllama.ops.gpu.attention import PASSES, attention
from tinyllama.ops.gpu.gemm import Packed, product
from tinyllama.runtime.blocks import TYPE_CODE

# tests/train/test_gpu.py holds that OpenCL answers where its library is.
pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("OpenCL") is None, reason="OpenCL is missing: tools/system.sh opencl"
)
HELPERS = Path(gpu_kernels.__file__).parent


@pytest.mark.parametrize("dtype", TYPE_CODE)
def test_the_texts_compile_without_a_warning(dtype: str, tmp_path: Path) -> None:
    """pocl prints the number of warnings to whoever trains."""
    launches = [
        attention("opencl", which, 1, T, 2, 1, 64, dtype) for which in PASSES for T in (77, 128)
    ]
    launches += [product("opencl", layout, 64, 72, 80, dtype) for layout in ("NT", "NN", "TN")]
    for packed in (Packed(), Packed(8, 32, minimum=True)):
        more = {"packed": packed, "addend": True}
        launches += [
            product("opencl", layout, 37, 64, 64, dtype, **more) for layout in ("NT", "NN")
        ]
    command = ["clang", "-x", "cl", "-cl-std=CL1.2", "-Xclang", "-finclude-default-header"]
    for launch in launches:
        path = tmp_path / f"{launch.name}.cl"
        path.write_text(launch.text)
        words = [*command, "-fsyntax-only", "-Wall", "-Wno-unused-function", "-Werror", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]


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
