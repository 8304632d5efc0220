"""What the process does about its own memory."""

import platform

import pytest
from runs_helpers import printed

FREED = """
import sys
import numpy as np
from tinyllama.system.memory import resident_bytes, return_freed_arrays
if sys.argv[1] == "yes":
    return_freed_arrays()
for _ in range(3):
    np.ones(6 << 20)  # 48 MB, which glibc takes as a reason to keep smaller blocks
    held = [np.ones(3 << 20), bytearray(100)]  # 24 MB, and what keeps them from the heap's end
    keeper = [bytearray(1000) for _ in range(1000)]
    del held
print(resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_arrays_go_back_to_the_system():
    kept, returned = (int(printed("-c", FREED, word)) for word in ("no", "yes"))
    assert kept - returned > 15e6
