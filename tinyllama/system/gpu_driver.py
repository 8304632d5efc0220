"""What a driver reports about its device: name, kind, memory."""

import ctypes
from typing import Any

from tinyllama.errors import DeviceError
from tinyllama.system.nvrtc import INSTALL, CompileFailed, Nvrtc


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


# Doubles 64 numbers. The header is what tinygrad's own kernels for bfloat16 need.
_TRIAL = """#include <cuda_bf16.h>
extern "C" __global__ void trial(float *x) { x[threadIdx.x] *= 2; }"""


def try_cuda(opened: Any, nvrtc: Nvrtc | None) -> None:
    """Compile a small kernel for the card, and run it.

    Raises DeviceError with what to install, where NVRTC is missing, does not know the card, or is
    too new for the driver; RuntimeError if the result is wrong.
    """
    if nvrtc is None:
        raise DeviceError(f"the card and its driver are here; it needs {INSTALL}")
    try:
        cubin = nvrtc.compile(_TRIAL, nvrtc.options(opened.arch))
    except CompileFailed as error:
        if nvrtc.headers is None:
            raise DeviceError(
                f"{nvrtc.line()} finds no cuda_bf16.h: `pip install nvidia-cuda-runtime`"
            ) from error
        raise DeviceError(f"{nvrtc.line()} does not compile for {opened.arch}: {error}") from error
    numbers = (ctypes.c_float * 64)(*range(64))
    _run_trial(opened, cubin, numbers, nvrtc)
    if [*numbers] != [2.0 * i for i in range(64)]:
        raise RuntimeError(f"computes wrong results: {numbers[1]} instead of 2.0")


def _run_trial(opened: Any, cubin: bytes, numbers: Any, nvrtc: Nvrtc) -> None:
    from tinygrad.runtime.autogen import cuda

    module, function, place = cuda.CUmodule(), cuda.CUfunction(), cuda.CUdeviceptr()
    size, grid = ctypes.sizeof(numbers), (1, 1, 1, 64, 1, 1)
    _succeeds("cuCtxSetCurrent", cuda.cuCtxSetCurrent(opened.context))
    if failed := cuda.cuModuleLoadData(ctypes.byref(module), cubin):
        raise DeviceError(
            f"the driver, which is for CUDA {_cuda_of_driver()}, does not load what "
            f"{nvrtc.line()} compiled (error {failed}): update the driver, or install an older "
            "nvidia-cuda-nvrtc"
        )
    _succeeds(
        "cuModuleGetFunction", cuda.cuModuleGetFunction(ctypes.byref(function), module, b"trial")
    )
    _succeeds("cuMemAlloc", cuda.cuMemAlloc_v2(ctypes.byref(place), size))
    given = (ctypes.c_void_p * 1)(ctypes.addressof(place))
    _succeeds("cuMemcpyHtoD", cuda.cuMemcpyHtoD_v2(place, numbers, size))
    _succeeds("cuLaunchKernel", cuda.cuLaunchKernel(function, *grid, 0, None, given, None))
    _succeeds("cuMemcpyDtoH", cuda.cuMemcpyDtoH_v2(numbers, place, size))
    cuda.cuMemFree_v2(place)
    cuda.cuModuleUnload(module)


def _succeeds(call: str, failed: int) -> None:
    if failed:
        raise RuntimeError(f"{call} fails with error {failed}")


def _cuda_of_driver() -> str:
    """The version of CUDA that a driver is for, such as 13.0."""
    from tinygrad.runtime.autogen import cuda

    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
