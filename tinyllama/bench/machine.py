"""The machine and the libraries that a figure was measured with."""

import os
import platform
from importlib import metadata
from typing import Any

from tinyllama.system import device, processor

PACKAGES = ("tinygrad", "numpy")
BUSY = 0.5  # processors kept busy by other programs, above which a warning is printed


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads used, instruction set, versions, and the load before the benchmark."""
    return {
        "processor": processor.processor_name(),
        "threads": threads,
        "instruction_set": device.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "load_average": _load_average(),
    }


def line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"{machine['system']}; {versions}"
    )


def warning(machine: dict[str, Any]) -> str | None:
    """A warning if other programs were running, else None. Threads that wait for each other suffer
    most, so that even a ratio differs from that on an idle machine."""
    if machine["load_average"] <= BUSY:
        return None
    return (
        f"warning: the machine was busy (load {machine['load_average']:.1f} before the benchmark): "
        "times and ratios differ from those on an idle one"
    )


def _load_average() -> float:
    """Running processes, averaged over a minute; 0 where the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return 0.0


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
