"""tinygrad's CPU device, and whether it compiles C."""

import functools
from typing import Any

from tinygrad.device import Device
from tinygrad.helpers import Context


def cpu_device() -> Any:
    """The CPU device, opened if it is not yet."""
    # While tinygrad generates code it forbids this, although the device may long be open.
    with Context(ALLOW_DEVICE_USAGE=1):
        return Device["CPU"]


@functools.cache
def clang_compiles() -> bool:
    """Whether tinygrad's CPU backend writes C for clang (DEV=CPU:LLVM does not)."""
    return type(cpu_device().renderer).__name__ == "ClangJITRenderer"
