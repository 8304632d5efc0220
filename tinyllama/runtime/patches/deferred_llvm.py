"""LLVM's library is loaded where it compiles, which with clang is nowhere."""

from tinyllama.runtime.patches.patch import Patch
from tinyllama.system.bindings import defer_llvm
from tinyllama.system.device import DEFERRED_LLVM

# system/device.py calls it as well: a device imports the binding before any patch is installed.
PATCH = Patch(
    name=DEFERRED_LLVM,
    replaces=("tinygrad.runtime.autogen.llvm",),
    why="loads libLLVM when something is compiled with it: 50 MB, and 0.06 s of every start",
    test="tests/runtime/test_deferred_llvm.py::test_a_start_with_clang_does_not_load_llvm",
    apply=defer_llvm,
)
