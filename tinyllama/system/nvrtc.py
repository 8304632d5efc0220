"""NVRTC, NVIDIA's compiler for CUDA texts: where it is, and how it is called.

It is looked for in this order; the first that loads is taken:

    named     the file that NVRTC_PATH names
    wheel     the package nvidia-cuda-nvrtc (`pip install 'tinyllama-trainer[cuda]'`)
    toolkit   CUDA's own folder (CUDA_HOME, CUDA_PATH, /usr/local/cuda, /opt/cuda)
    system    where the system looks for libraries

Texts become machine code for one architecture (a cubin), never PTX, which a driver older than NVRTC
does not take. A card is not needed. Any number of threads may compile at once.
"""

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

INSTALL = (
    "NVRTC, CUDA's compiler, which `pip install 'tinyllama-trainer[cuda]'` or the CUDA toolkit has"
)
_PATTERNS = ("libnvrtc.so*", "nvrtc64_*.dll")
_HEADER = "cuda_bf16.h"
_BUILTINS = ("libnvrtc-builtins.so*", "nvrtc-builtins64_*.dll")


class CompileFailed(Exception):
    """NVRTC refused a text; what it says about it."""


class Nvrtc:
    """A loaded NVRTC. Raises OSError or AttributeError where `path` is no NVRTC."""

    def __init__(self, path: str, origin: str, headers: Path | None) -> None:
        """`headers` is the folder of cuda_bf16.h, which tinygrad's own kernels include."""
        # The compiler looks for its builtins by name alone: they are loaded first.
        for pattern in _BUILTINS:
            for builtins in sorted(Path(path).parent.glob(pattern)):
                with suppress(OSError):
                    ctypes.CDLL(str(builtins))
        self.path, self.origin, self.headers = path, origin, headers
        self._library: Any = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def line(self) -> str:
        """Version and place: NVRTC 13.5 of the CUDA toolkit, /usr/local/cuda/..."""
        return f"NVRTC {self.version[0]}.{self.version[1]} of {self.origin}, {self.path}"

    def options(self, arch: str) -> list[str]:
        """The compiler's options for cards of an architecture, such as sm_90."""
        minimal = ["--minimal"] if self.version >= (12, 4) else []  # omits what no kernel uses
        folders = [f"-I{self.headers}"] if self.headers else []
        return [f"--gpu-architecture={arch}", *minimal, *folders]

    def compile(self, text: str, options: Sequence[str]) -> bytes:
        """The machine code of a CUDA text. Raises CompileFailed."""
        nvrtc, program, size = self._library, ctypes.c_void_p(), ctypes.c_size_t()
        words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
        try:
            if status := nvrtc.nvrtcCompileProgram(program, len(words), words):
                raise CompileFailed(self._log(program) or f"NVRTC: error {status}")
            nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
            cubin = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetCUBIN(program, cubin)
            return cubin.raw
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        self._library.nvrtcGetProgramLog(program, log)
        return log.value.decode(errors="replace").strip()


def find(named: str, toolkits: Sequence[Path]) -> Nvrtc | None:
    """The first NVRTC that loads; `named` is a file or empty, `toolkits` are CUDA's folders."""
    for path, origin in _candidates(named, toolkits):
        headers = _headers(Path(path), toolkits)
        with suppress(OSError, AttributeError):
            return Nvrtc(path, origin, headers)
    return None


def _candidates(named: str, toolkits: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Files, and the words for where they are from."""
    if named:
        yield named, "NVRTC_PATH"
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("nvidia")
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for file in _files(Path(root), "*/lib", "*/bin"):
                yield file, "the package nvidia-cuda-nvrtc"
    for toolkit in toolkits:
        for file in _files(toolkit, "lib64", "lib", "targets/*/lib", "bin"):
            yield file, "the CUDA toolkit"
    if name := ctypes.util.find_library("nvrtc"):
        yield name, "the system"


def _headers(library: Path, toolkits: Sequence[Path]) -> Path | None:
    """The folder of CUDA's headers: beside the library, else in a toolkit, else the system's."""
    places = [*library.resolve().parents, *toolkits, Path("/usr")]
    folders = [place / "include" for place in places]
    return next((folder for folder in folders if (folder / _HEADER).exists()), None)


def _files(root: Path, *folders: str) -> list[str]:
    """Libraries in these folders below `root`, the newest version first."""
    found = {
        file
        for folder in folders
        for pattern in _PATTERNS
        for file in root.glob(f"{folder}/{pattern}")
        if ".alt." not in file.name
    }
    return sorted(map(str, found), key=lambda file: (Path(file).name, file), reverse=True)
