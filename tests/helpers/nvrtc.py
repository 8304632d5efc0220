"""Compiles CUDA texts where the package nvidia-cuda-nvrtc is installed; a card is not needed."""

from tinyllama.runtime.cubin import FRAME_BYTES, REGISTERS, attributes, shared_bytes
from tinyllama.system.device import nvrtc_library as library
from tinyllama.system.nvrtc import CompileFailed

__all__ = [
    "FRAME_BYTES",
    "REGISTERS",
    "attributes",
    "compile_cubin",
    "library",
    "shared_bytes",
]


def compile_cubin(text: str, arch: str) -> bytes:
    """The kernel's machine code for `arch`, such as sm_90."""
    nvrtc = library()
    assert nvrtc is not None
    try:
        return nvrtc.compile(text, [f"--gpu-architecture={arch}"])
    except CompileFailed as error:
        raise AssertionError(str(error)) from error
