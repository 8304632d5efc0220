"""The machine and the libraries a figure was measured on."""

import os
import platform
from importlib import metadata
from typing import Any

from tinyllama.system import device, processor

PACKAGES = ("tinygrad", "numpy")
BUSY = 0.5  # processors that other programs may keep busy before a figure is in doubt


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads used, instruction set, versions, and the load before the benchmark."""
    return {
        "processor": processor.processor_name(),
        "threads": threads,
        "instruction_set": device.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "load_average": os.getloadavg()[0],
    }


def line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"{machine['system']}; {versions}"
    )


def warning(machine: dict[str, Any]) -> str | None:
    """What to say where other programs were running: threads that wait for each other suffer most,
    so that even a ratio is not what it would be on a quiet machine."""
    if machine["load_average"] <= BUSY:
        return None
    return (
        f"warning: the machine was busy (load {machine['load_average']:.1f} before the benchmark): "
        "times and ratios are not those of a quiet one"
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
