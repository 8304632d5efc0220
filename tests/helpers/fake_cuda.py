"""A CUDA driver without a card (fake_cuda.c), for processes that a test starts."""

import functools
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from runs_helpers import shared_folder

from tinyllama.system import device

needs_nvrtc = pytest.mark.skipif(
    device.nvrtc_library() is None, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


@functools.cache
def folder() -> Path:
    """A folder with a libcuda.so."""
    made = shared_folder() / "fake_cuda"
    made.mkdir()
    source = Path(__file__).with_suffix(".c")
    command = [
        "clang",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        "-o",
        str(made / "libcuda.so"),
        str(source),
    ]
    subprocess.run(command, check=True)
    return made


def variables(log: Path, **more: str) -> dict[str, str]:
    """The environment in which the driver is found."""
    return {"LD_LIBRARY_PATH": str(folder()), "FAKE_CUDA_LOG": str(log), **more}


def starts(log: Path) -> Counter[str]:
    """How often each kind of line stands in the log: kernel, node, graph, ..."""
    return Counter(line.split()[0] for line in log.read_text().splitlines())
