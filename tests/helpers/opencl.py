"""Runs GPU texts on OpenCL in a process of its own, and compiles them with clang alone."""

import ctypes.util
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from runs_helpers import printed_json

from tinyllama.runtime.blocks import Launch

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
    """What gpu_on_opencl.py prints."""
    return printed_on_opencl("gpu_on_opencl.py", *words)


def printed_on_opencl(file: str, *words: str) -> dict:
    """What a file beside this one prints. One thread: with two, pocl 3.1 gives random results."""
    script = Path(__file__).with_name(file)
    found: dict = printed_json(script, *words, DEV="CL", POCL_MAX_PTHREAD_COUNT="1")
    return found
