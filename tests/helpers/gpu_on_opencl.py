"""Runs OpenCL texts for real, and prints JSON:

    python gpu_on_opencl.py product|together|attention|rows NAME...

A process of its own: pocl reads POCL_MAX_PTHREAD_COUNT when it is loaded.
"""

import json
import sys
from collections.abc import Sequence

import gpu_kernels
import gpu_rows
import numpy as np
from tinygrad import dtypes
from tinygrad.device import Buffer, Device

from tinyllama.runtime.blocks import Launch, Limits


def run(launch: Launch, arrays: Sequence[np.ndarray]) -> None:
    types = tuple(((i, dtypes.float.ptr()),) for i in range(len(arrays)))
    program = Device["CL"].runtime(launch.name, launch.text.encode(), types)
    buffers = [Buffer("CL", array.nbytes, dtypes.uint8).allocate() for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        buffer.copyin(memoryview(array).cast("B"))
    program(
        *(buffer._buf for buffer in buffers),
        global_size=launch.grid,
        local_size=(launch.threads, 1, 1),
        wait=True,
    )
    for buffer, array in zip(buffers, arrays, strict=True):
        buffer.copyout(memoryview(array).cast("B"))


if __name__ == "__main__":
    kind, *names = sys.argv[1:]
    found: dict[str, object] = {}
    for name in names:
        if kind == "product":
            found[name] = gpu_kernels.run_product(run, "opencl", name)
        elif kind == "together":
            found[name] = gpu_kernels.wrong_together(run, "opencl", name)
        elif kind == "rows":
            found[name] = gpu_rows.CASES[name](run, "opencl", gpu_rows.same)
        else:
            # Of local memory this case needs 33 KB, more than the least that a device has.
            limits = Limits(64 << 10) if name.startswith("float32, D 128") else None
            found[name] = gpu_kernels.wrong_attention(run, "opencl", name, limits=limits)
    print(json.dumps(found))
