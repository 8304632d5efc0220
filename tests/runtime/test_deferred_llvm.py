"""libLLVM is loaded where it compiles: not by a start with clang."""

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

needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


def has_llvm() -> bool:
    from tinygrad.runtime.autogen import llvm

    return llvm.dll.nm in llvm.dll._loaded_


@needs_maps
def test_llvm_is_loaded_where_it_compiles() -> None:
    assert printed_json("-c", SELECTED, DEV="CPU") == [12.0, False]


@needs_maps
@pytest.mark.skipif(not Path("/proc/self/maps").exists() or not has_llvm(), reason="no libLLVM")
def test_without_the_patch_a_start_with_clang_loads_llvm() -> None:
    found = printed_json("-c", SELECTED, DEV="CPU", TINYLLAMA_PATCHES_OFF="deferred_llvm")
    assert found == [12.0, True]


def test_a_binding_that_has_been_read_stays() -> None:
    import tinygrad.runtime.autogen.llvm as read

    from tinyllama.system.bindings import defer_llvm

    before = read.LLVMContextCreate
    defer_llvm()
    assert sys.modules["tinygrad.runtime.autogen.llvm"] is read
    assert read.LLVMContextCreate is before
