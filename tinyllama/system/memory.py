"""How much memory the process holds, and how much its device has left."""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

from tinyllama.system import gpu_driver

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3  # of malloc.h


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


def return_freed_arrays() -> None:
    """Let what malloc gets for arrays of 4 MB or more go back to the system when it is freed.

    glibc would keep up to 32 MB of such a block for later: 10 to 44 MB of a small model's run.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


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
    limits = [_container_bytes(proc, cgroup), _system_bytes(proc)]
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


def _container_bytes(proc: Path, cgroup: Path) -> int | None:
    """The least that the limits of the process's control group and of those around it leave, in
    version 2 or 1; their file cache counts as free. None without a limit."""
    v2 = ("memory.max", "memory.current", "memory.stat", "file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_cache")
    left = [
        _left_bytes(group, *names)
        for names, root, path in (
            (v2, cgroup, _group(proc, "")),
            (v1, cgroup / "memory", _group(proc, "memory")),
        )
        for group in (root / path, *(root / path).parents)
        if group == root or root in group.parents
    ]
    return min((bytes_ for bytes_ in left if bytes_ is not None), default=None)


def _group(proc: Path, controller: str) -> str:
    """The path of the process's control group, from its controller's root ("" in version 2)."""
    for line in _lines(proc / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            # A process that was moved out of its container's root sees "/../other".
            return "/".join(part for part in path.split("/") if part not in ("", "..", "."))
    return ""


def _left_bytes(group: Path, limit: str, used: str, stat: str, cache: str) -> int | None:
    """What the limit of one control group leaves; None where it has none ("max")."""
    numbers = [_lines(group / name) for name in (limit, used)]
    if not all(lines and lines[0].isdigit() for lines in numbers):
        return None
    words = (line.split() for line in _lines(group / stat))
    cached = sum(int(number) for key, number in words if key == cache)
    return int(numbers[0][0]) - int(numbers[1][0]) + cached


def _lines(file: Path) -> list[str]:
    """Lines of a system file; none if it does not exist (no Linux, or no container)."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
