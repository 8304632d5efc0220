"""What the processor calls itself, and which of its vector instructions our kernels use."""

import functools
import platform
import sys
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """The processor's model name, e.g. "AMD EPYC"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def instruction_set() -> str:
    """The widest vector instructions our kernels have a tile for, by the processor's own flags."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "NEON"
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    elif sys.platform == "darwin":
        return "generic"
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "AVX-512-BF16" if "avx512_bf16" in flags else "AVX-512"
    return "AVX2" if {"avx2", "fma", "f16c"} <= flags else "generic"
