"""CUDA texts compiled to machine code for the card, by the NVRTC that is installed.

tinygrad makes PTX for the driver to compile, which a driver older than NVRTC refuses; it does not
look for NVRTC in packages; and its cache does not know which NVRTC has compiled.
"""

from typing import Any

from tinygrad.codegen.opt import tc
from tinygrad.device import CompileError, Compiler, Device
from tinygrad.renderer.cstyle import CStyleLanguage, CUDARenderer

from tinyllama.runtime.patches.patch import Patch
from tinyllama.system import device
from tinyllama.system.nvrtc import INSTALL, CompileFailed


class CubinCompiler(Compiler):  # type: ignore[misc]
    """Machine code for cards of one architecture, such as sm_90."""

    def __init__(self, arch: str) -> None:
        nvrtc = device.nvrtc_library()
        if nvrtc is None:
            raise CompileError(f"CUDA kernels need {INSTALL}")
        self.nvrtc, self.options = nvrtc, nvrtc.options(arch)
        version = ".".join(map(str, nvrtc.version))
        super().__init__(f"compile_cubin_{arch}_nvrtc_{version}")

    def compile(self, src: str) -> bytes:
        """The cubin of a text; any number of threads may call this at once."""
        try:
            return self.nvrtc.compile(src, self.options)
        except CompileFailed as error:
            raise CompileError(f"{self.nvrtc.line()}: {error}") from error


def apply() -> None:
    """From here on, tinygrad's renderer for CUDA has this compiler, unless it is NVCC's."""
    make = CUDARenderer.__init__

    def make_with_ours(renderer: Any, target: Any, use_nvcc: bool = False) -> None:
        if use_nvcc:
            make(renderer, target, use_nvcc)
            return
        CStyleLanguage.__init__(renderer, target)
        renderer.compiler = CubinCompiler(target.arch)
        renderer.tensor_cores = tc.get_cuda(target.arch)

    CUDARenderer.__init__ = make_with_ours
    for name in Device._opened_devices:  # each makes another renderer when it needs one
        Device[name].cached_renderer.clear()


PATCH = Patch(
    name="cubin",
    replaces=("tinygrad.renderer.cstyle.CUDARenderer.__init__",),
    why="compiles CUDA to machine code for the card by any NVRTC that is installed; tinygrad's PTX"
    " needs a driver as new as NVRTC, and it does not find NVRTC in packages",
    test="tests/runtime/test_cubin.py::test_a_card_gets_machine_code",
    apply=apply,
)
