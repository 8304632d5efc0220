"""Compiles CUDA texts where the package nvidia-cuda-nvrtc is installed; a card is not needed."""

import pytest

from tinyllama.runtime.cubin import FRAME_BYTES, REGISTERS, attributes, shared_bytes
from tinyllama.system.device import nvrtc_library as library
from tinyllama.system.nvrtc import CompileFailed

__all__ = [
    "FRAME_BYTES",
    "REGISTERS",
    "attributes",
    "compile_cubin",
    "library",
    "needed",
    "shared_bytes",
]
ARCHITECTURES = ("sm_80", "sm_90")
RESERVED = {"sm_80": 0, "sm_90": 1024}  # bytes of shared memory that the card takes per block


needed = pytest.mark.skipif(
    library() is None, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


def compile_cubin(text: str, arch: str) -> bytes:
    """The kernel's machine code for `arch`, such as sm_90."""
    nvrtc = library()
    assert nvrtc is not None
    try:
        return nvrtc.compile(text, [f"--gpu-architecture={arch}"])
    except CompileFailed as error:
        raise AssertionError(str(error)) from error
