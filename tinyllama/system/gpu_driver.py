"""What a driver reports about its device: name, kind, memory."""

import ctypes
from typing import Any


def opencl_bytes(opened: Any) -> int:
    """Memory of an OpenCL device in bytes, free or not: OpenCL does not report which."""
    from tinygrad.runtime.autogen import opencl

    return _opencl_number(opened, opencl.CL_DEVICE_GLOBAL_MEM_SIZE)


def opencl_is_processor(opened: Any) -> bool:
    """Whether an OpenCL device is the processor, by its driver's own word."""
    from tinygrad.runtime.autogen import opencl

    return bool(_opencl_number(opened, opencl.CL_DEVICE_TYPE) & opencl.CL_DEVICE_TYPE_CPU)


def opencl_compute_units(opened: Any) -> int:
    """Parts of an OpenCL device that run work-groups side by side."""
    from tinygrad.runtime.autogen import opencl

    return _opencl_number(opened, opencl.CL_DEVICE_MAX_COMPUTE_UNITS)


def opencl_local_bytes(opened: Any) -> int:
    """Local memory of an OpenCL device that a work-group may use, in bytes."""
    from tinygrad.runtime.autogen import opencl

    return _opencl_number(opened, opencl.CL_DEVICE_LOCAL_MEM_SIZE)


def _opencl_number(opened: Any, key: int) -> int:
    from tinygrad.runtime.autogen import opencl

    number = ctypes.c_uint64()
    opencl.clGetDeviceInfo(opened.device_id, key, 8, ctypes.byref(number), None)
    return number.value


def cuda_bytes(opened: Any) -> int | None:
    """Free memory of a CUDA device in bytes; None if the driver does not report it."""
    from tinygrad.runtime.autogen import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = cuda.cuCtxSetCurrent(opened.context)
    failed = failed or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value


def cuda_multiprocessors(opened: Any) -> int:
    """Multiprocessors of a CUDA device."""
    from tinygrad.runtime.autogen import cuda

    count = ctypes.c_int(1)
    key = cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    cuda.cuDeviceGetAttribute(ctypes.byref(count), key, opened.cu_device)
    return max(1, count.value)


def cuda_name(opened: Any) -> str:
    """The driver's name for a CUDA device, and its architecture."""
    from tinygrad.runtime.autogen import cuda

    name = ctypes.create_string_buffer(256)
    failed = cuda.cuDeviceGetName(name, len(name), opened.cu_device)
    return f"{'NVIDIA' if failed else name.value.decode(errors='replace')}, {opened.arch}"
