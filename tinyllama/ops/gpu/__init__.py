"""Kernels for GPUs: one text each for CUDA, Metal and OpenCL, and beside it how it is launched.

Per kernel there are a text (`gemm.c`) and a builder (`gemm.py`), which chooses how the work is cut
up, checks what the kernel takes, and returns a `blocks.Launch`. `cuda.h`, `metal.h` and `opencl.h`
are the dialects; `tile.h` holds tiles in shared memory and registers.
"""
