"""Kernels for AMX with its registers in C, so that any processor with AVX-512 runs them."""

import ctypes
import mmap
from pathlib import Path
from typing import Any

from tinyllama.runtime import c_kernel
from tinyllama.system import processor

REGISTERS = Path(__file__).parents[1] / "ops" / "kernels" / "tile_in_c.h"
# Where the registers lie in a process that `install` has prepared.
PLACE, PLACE_BYTES = 0x7E0000000000, 16384
NOTHING_ELSE_THERE = 0x100000  # MAP_FIXED_NOREPLACE of Linux

_source = c_kernel.source


def source(file: str, place: int | None = None) -> str:
    """Text of a file of `ops/cpu/`; that of the unit's registers comes after registers in C."""
    text = _source(file)
    if file != "amx.h":
        return text
    at = "" if place is None else f"#define TILE_PLACE {place:#x}L\n"
    return f"{at}{REGISTERS.read_text()}\n#define TILE_IN_C\n{text}"


def install() -> None:
    """Let this process, which must compute on one thread, take every kernel for AMX."""
    libc: Any = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NOTHING_ELSE_THERE
    found = libc.mmap(PLACE, PLACE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert found == PLACE, "the place of the registers is taken"
    changed: Any = processor
    changed.instruction_set = lambda amx=True: "AMX"
    changed = c_kernel
    changed.source = lambda file: source(file, PLACE)
