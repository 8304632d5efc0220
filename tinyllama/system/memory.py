"""How much memory the process holds, and how much its device can give."""

import gc
import os
import sys
from pathlib import Path

from tinyllama.system import gpu_driver


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process in bytes, now or at its highest."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def collect_seldom() -> None:
    """Have Python look for garbage in cycles a hundred times less often than it does by default.

    It walks every object it knows, and a step's graph is made of hundreds of thousands that stay: a
    tenth of the time to the first loss.
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
    """Bytes a run may take on its device: what the system can give, or a container's limit leaves;
    of an OpenCL device, all it has; what CUDA's driver has free.

    None where it is not known, which is so of other devices.
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
    """MemAvailable where Linux says so, or else all of the machine's memory."""
    meminfo = _lines(proc / "meminfo")
    for line in meminfo:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else -1
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _container_bytes(cgroup: Path) -> int | None:
    """What a control group's limit (version 2 or 1) leaves; its file cache can be taken back."""
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
    """Lines of a file of the system, none where it is not there: no Linux, or no container."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
