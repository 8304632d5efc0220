"""The processor's name, and which of its vector instructions our kernels use."""

import ctypes
import functools
import platform
import sys
from pathlib import Path

# Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


@functools.cache
def described() -> dict[str, str]:
    """Linux's description of the first processor (/proc/cpuinfo); empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    values: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), value.strip())
    return values


@functools.cache
def processor_name() -> str:
    """The processor's model name, e.g. "AMD EPYC"."""
    return described().get("model name") or platform.processor() or platform.machine()


@functools.cache
def instruction_set(amx: bool = True) -> str:
    """The widest vector instructions that our kernels have a tile for, by the processor's flags.

    AMX counts if the system permits it; `amx=False` leaves it out.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "NEON"
    if sys.platform == "darwin":
        return "generic"
    flags = set(described().get("flags", "").split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        if amx and has_amx() and amx_permitted():
            return "AMX"
        return "AVX-512-BF16" if "avx512_bf16" in flags else "AVX-512"
    return "AVX2" if {"avx2", "fma", "f16c"} <= flags else "generic"


def has_amx() -> bool:
    """Whether the processor has AMX for bfloat16, permitted or not."""
    needed = {"avx512_bf16", "amx_tile", "amx_bf16"}
    return needed <= set(described().get("flags", "").split())


@functools.cache
def amx_permitted() -> bool:
    """Whether Linux lets this process use AMX's registers; a process must request them.

    The permission holds for all threads and for forked children. Kernels before 5.16 refuse, and
    so does one that finds a thread's signal stack too small to save the registers.
    """
    system = ctypes.CDLL(None)
    request = map(ctypes.c_long, (ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA))
    return bool(system.syscall(*request) == 0)


def multiplies_bf16(instructions: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32 with these instructions.

    They are in AMX. Of vdpbf16ps it depends on the vendor: Intel's takes four times as long as a
    float32 multiply-add, for twice the products.
    """
    if instructions == "AVX-512-BF16":
        return described().get("vendor_id") != "GenuineIntel"
    return instructions == "AMX"
