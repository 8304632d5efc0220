"""The machine and the libraries a figure was measured on."""

import platform
from importlib import metadata
from typing import Any

from tinyllama import device

PACKAGES = ("tinygrad", "numpy")


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads used, instruction set, memory in bytes (None if unknown), versions."""
    return {
        "processor": device.processor_name(),
        "threads": threads,
        "instruction_set": device.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"{machine['system']}; {versions}"
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
