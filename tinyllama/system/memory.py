"""How much memory the process holds, and how much its device has left."""

import gc
import os
import sys
from pathlib import Path

from tinyllama.system import gpu_driver

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STATUS = Path("/proc/self/status")


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process in bytes, now or at its highest; on macOS always at its
    highest; 0 on a system that does not report it."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in _lines(STATUS):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def can_measure() -> bool:
    """Whether the system reports a process's memory."""
    return resource is not None or STATUS.exists()


def collect_seldom() -> None:
    """Let Python collect cyclic garbage a hundred times less often than it does by default.

    A collection walks every object, and a step's graph is made of hundreds of thousands that stay:
    that was a tenth of the time to the first loss.
    """
    gc.set_threshold(100_000, 20, 50)


def memory_in_use_bytes() -> int:
    """Bytes the run holds on its device: resident memory on the CPU, buffers elsewhere."""
    from tinygrad.device import Device
    from tinygrad.helpers import GlobalCounters

    if Device.DEFAULT == "CPU":
        return resident_bytes()
    return int(GlobalCounters.mem_used_per_device[Device.DEFAULT])


def free_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Free memory of a run's device in bytes: on the CPU, what the system or the container's limit
    leaves; of a CUDA device, what its driver reports; of an OpenCL device, all of its memory.

    None where it is not known, as of every other device.
    """
    from tinygrad.device import Device

    if Device.DEFAULT == "CL":
        return gpu_driver.opencl_bytes(Device["CL"])
    if Device.DEFAULT == "CUDA":
        return gpu_driver.cuda_bytes(Device["CUDA"])
    if Device.DEFAULT != "CPU":
        return None
    limits = [_container_bytes(cgroup), _system_bytes(proc)]
    return min((limit for limit in limits if limit is not None), default=None)


def _system_bytes(proc: Path) -> int | None:
    """MemAvailable on Linux, elsewhere all of the machine's memory; None where it is not known."""
    meminfo = _lines(proc / "meminfo")
    for line in meminfo:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})  # Windows has no sysconf
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else -1
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _container_bytes(cgroup: Path) -> int | None:
    """What a control group's limit (version 2 or 1) leaves; its file cache counts as free."""
    v2 = ("memory.max", "memory.current", "memory.stat", "file")
    v1 = ("limit_in_bytes", "usage_in_bytes", "stat", "total_cache")
    for limit, used, stat, cache in (v2, tuple(f"memory/memory.{name}" for name in v1)):
        numbers = [_lines(cgroup / name) for name in (limit, used)]
        if all(lines and lines[0].isdigit() for lines in numbers):  # "max" is no limit
            words = (line.split() for line in _lines(cgroup / stat))
            cached = sum(int(number) for key, number in words if key == cache.rpartition(".")[2])
            return int(numbers[0][0]) - int(numbers[1][0]) + cached
    return None


def _lines(file: Path) -> list[str]:
    """Lines of a system file; none if it does not exist (no Linux, or no container)."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
