"""Compiles CUDA texts where the package nvidia-cuda-nvrtc is installed; a card is not needed."""

import ctypes
import functools
import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_90")
RESERVED = {"sm_80": 0, "sm_90": 1024}  # bytes of shared memory that the card takes per block
REGISTERS, FRAME_BYTES = 0x2F, 0x11  # attributes of a cubin's .nv.info


@functools.cache
def library() -> Any:
    """NVRTC, or None."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None:
        return None
    names = [
        name
        for root in spec.submodule_search_locations or ()
        for name in sorted(Path(root).rglob("libnvrtc*.so*"))
        if ".alt." not in name.name
    ]
    # The compiler looks for its builtins by name alone: they are loaded first.
    for name in sorted(names, key=lambda name: "builtins" not in name.name):
        found = ctypes.CDLL(str(name))
    return found if names else None


needed = pytest.mark.skipif(
    library() is None, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


def compile_cubin(text: str, arch: str) -> bytes:
    """The kernel's machine code for `arch`, such as sm_90."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
    failed = nvrtc.nvrtcCompileProgram(program, 1, options)
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise AssertionError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def sections(cubin: bytes) -> dict[str, tuple[bytes, int]]:
    """Content and size of each section of an ELF file of 64 bits."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + entry * i) for i in range(count)]
    names = headers[names_at][4]
    found = {}
    for name, kind, _, _, offset, size, *_ in headers:
        word = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        found[word] = (b"" if kind == 8 else cubin[offset : offset + size], size)  # 8: no content
    return found


def attributes(cubin: bytes) -> dict[int, int]:
    """The attributes of .nv.info that hold a kernel's number and a value."""
    info = sections(cubin)[".nv.info"][0]
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # `size` bytes follow
            if size == 8:
                found[attribute] = struct.unpack_from("<II", info, at)[1]
            at += size
    return found


def shared_bytes(cubin: bytes) -> int:
    """Of shared memory that the kernel declares."""
    return sum(size for name, (_, size) in sections(cubin).items() if ".nv.shared." in name)
