"""What a GPU's driver says of it: its name, its memory."""

import ctypes
from typing import Any


def opencl_bytes(opened: Any) -> int:
    """Memory of an OpenCL device, free or not: OpenCL does not say which."""
    from tinygrad.runtime.autogen import opencl

    found = ctypes.c_uint64()
    opencl.clGetDeviceInfo(
        opened.device_id, opencl.CL_DEVICE_GLOBAL_MEM_SIZE, 8, ctypes.byref(found), None
    )
    return found.value


def cuda_bytes(opened: Any) -> int | None:
    """Memory of a CUDA device that no process holds; None if the driver does not answer."""
    from tinygrad.runtime.autogen import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = cuda.cuCtxSetCurrent(opened.context)
    failed = failed or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value


def cuda_name(opened: Any) -> str:
    """What the driver calls a CUDA device, and its architecture."""
    from tinygrad.runtime.autogen import cuda

    name = ctypes.create_string_buffer(256)
    failed = cuda.cuDeviceGetName(name, len(name), opened.cu_device)
    return f"{'NVIDIA' if failed else name.value.decode(errors='replace')}, {opened.arch}"
