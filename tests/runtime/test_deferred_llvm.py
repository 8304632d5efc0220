"""libLLVM is loaded where it compiles: by a use of its binding, not by a start with clang."""

import sys
from pathlib import Path

import pytest
from runs_helpers import printed_json

SELECTED = """
import json, sys
from tinyllama.system import device
device.select()
from tinyllama.runtime.patches import install
install()
from tinygrad import Tensor
total = (2 * Tensor([1.0, 2.0, 3.0])).sum().item()
loaded = [line for line in open("/proc/self/maps") if "libLLVM" in line]
print(json.dumps([total, bool(loaded)]))
"""

# Whether libLLVM is loaded before and after its binding is used, as tinygrad imports it.
USED = """
import json
from tinyllama.system.bindings import defer_llvm
defer_llvm()
from tinygrad.runtime.autogen import llvm
def loaded(): return any("libLLVM" in line for line in open("/proc/self/maps"))
before = loaded()
context = llvm.LLVMContextCreate()
llvm.LLVMContextDispose(context)
print(json.dumps([before, bool(context), loaded()]))
"""

needs_maps = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="this system shows no /proc/self/maps"
)


@pytest.fixture
def llvm() -> None:
    """Skips where there is no libLLVM."""
    from tinygrad.runtime.autogen import llvm

    if llvm.dll.nm not in llvm.dll._loaded_:
        pytest.skip("no libLLVM")


@needs_maps
def test_a_start_with_clang_does_not_load_llvm() -> None:
    assert printed_json("-c", SELECTED, DEV="CPU") == [12.0, False]


@needs_maps
@pytest.mark.usefixtures("llvm")
def test_without_the_patch_a_start_with_clang_loads_llvm() -> None:
    found = printed_json("-c", SELECTED, DEV="CPU", TINYLLAMA_PATCHES_OFF="deferred_llvm")
    assert found == [12.0, True]


@needs_maps
@pytest.mark.usefixtures("llvm")
def test_a_use_of_the_deferred_binding_loads_llvm() -> None:
    assert printed_json("-c", USED) == [False, True, True]


def test_a_binding_that_has_been_read_stays() -> None:
    import tinygrad.runtime.autogen.llvm as read

    from tinyllama.system.bindings import defer_llvm

    before = read.LLVMContextCreate
    defer_llvm()
    assert sys.modules["tinygrad.runtime.autogen.llvm"] is read
    assert read.LLVMContextCreate is before
