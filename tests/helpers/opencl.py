"""Runs GPU texts on OpenCL in a process of its own, and compiles them with clang alone."""

import ctypes.util
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from runs_helpers import ROOT, environment

from tinyllama.runtime.blocks import Launch

HELPERS = Path(__file__).parent
# tests/train/test_gpu.py holds that OpenCL answers where its library is.
needs_opencl = pytest.mark.skipif(
    ctypes.util.find_library("OpenCL") is None, reason="OpenCL is missing: tools/system.sh opencl"
)


def opencl_takes(launches: Iterable[Launch]) -> None:
    """Compile texts with clang as pocl does, where a warning is an error."""
    command = ["clang", "-x", "cl", "-cl-std=CL1.2", "-Xclang", "-finclude-default-header"]
    words = [*command, "-fsyntax-only", "-Wall", "-Wno-unused-function", "-Werror", "-"]
    for launch in launches:
        done = subprocess.run(words, input=launch.text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]


def on_opencl(*words: str) -> dict:
    """What gpu_on_opencl.py prints. One thread: with two, pocl 3.1 gives random results."""
    paths = f"{ROOT}:{HELPERS}"
    env = environment(DEV="CL", POCL_MAX_PTHREAD_COUNT="1", PYTHONPATH=paths)
    command = [sys.executable, str(HELPERS / "gpu_on_opencl.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
