"""GPU launches: the text of a kernel of `ops/gpu/` for a device's language, and how to start it.

A text is put together from macros, `common.h`, the header of a dialect (CUDA, Metal or OpenCL),
headers of the kernel's own, and the kernel. What cuts the work into blocks and names the macros
stands beside the text (`ops/gpu/gemm.py` is for `gemm.c`): it calls `launch`, which checks what a
device allows. `run` then puts the kernel into tinygrad's graph:

    launch = blocks.launch("gemm", dialect, macros, ...)
    c = blocks.run(launch, [empty(M, N, device=a.device)], [a, b])[0]
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

from tinygrad import Tensor, dtypes
from tinygrad.device import Device
from tinygrad.helpers import Context
from tinygrad.uop.ops import ProgramInfo

from tinyllama.runtime import kernel as common
from tinyllama.runtime.kernel import LARGEST, Gradient
from tinyllama.system import gpu_driver

Dialect = Literal["cuda", "metal", "opencl"]
DType = Literal["float32", "bfloat16", "float16"]

TYPE_NAME: Mapping[Any, DType] = {
    dtypes.float32: "float32", dtypes.bfloat16: "bfloat16", dtypes.float16: "float16",
}  # fmt: skip
TYPE_CODE: Mapping[DType, int] = {
    name: common.TYPE_CODE[dtype] for dtype, name in TYPE_NAME.items()
}
FMA, TF32X3, MMA16, SIMDGROUP = 0, 1, 2, 3  # FRAGMENT of common.h
KSTEP: Mapping[int, int] = {FMA: 1, TF32X3: 8, MMA16: 16, SIMDGROUP: 8}


# Of devices that report none: the A100's and the H100's, compiled for without a card.
MULTIPROCESSORS: Mapping[str, int] = {"sm_80": 108, "sm_90": 132}


class UnsupportedSize(ValueError):
    """Sizes that a kernel does not take; the portable form of the operation does."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a launch may use."""

    shared_bytes: int  # that a kernel declares, per block
    threads: int = 1024  # per block
    buffers: int | None = None  # arguments


# CUDA: more than 48 KB must be requested at the launch, which tinygrad 0.13 forgets in a captured
# step. OpenCL: the least that full devices have; many have 48 or 64 KB.
LIMITS: Mapping[Dialect, Limits] = {
    "cuda": Limits(48 << 10),
    "metal": Limits(32 << 10, buffers=31),
    "opencl": Limits(32 << 10),
}
# Blocks along z: the same for every device of a dialect, so they are not in `Limits`.
LAYERS: Mapping[Dialect, int] = {"cuda": 65535, "metal": LARGEST - 1, "opencl": LARGEST - 1}
WIDE_MACROS = ("COUNT",)  # numbers of a text that have 64 bits: elements of a whole tensor


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's text, and how it is started."""

    name: str  # of the function in the text
    text: str
    grid: tuple[int, int, int]  # blocks
    threads: int  # per block
    shared_bytes: int  # per block, declared in the text or given at the launch
    arguments: tuple[str, ...]  # buffers in their order
    flops: int  # of the operation, without what edges and masks add
    dynamic_bytes: int = 0  # of shared memory that the launch gives
    updates: bool = False  # the kernel also reads what its outputs hold


def dialect_of(device: str) -> Dialect | None:
    """The dialect that a device's compiler takes; None where our kernels do not run.

    The device NULL, which compiles and counts, takes CUDA's if it renders CUDA
    (DEV=NULL:CUDA:sm_90), and Metal's, whose compiler only macOS has, by name (DEV=NULL::metal).
    """
    name = device.partition(":")[0]
    if name == "NULL":
        renderer = _opened(device).renderer
        if renderer.target.arch == "metal":
            return "metal"
        return "cuda" if type(renderer).__name__ == "CUDARenderer" else None
    dialects: dict[str, Dialect] = {"CUDA": "cuda", "METAL": "metal", "CL": "opencl"}
    return dialects.get(name)


@functools.cache
def is_processor(device: str) -> bool:
    """Whether a device is the processor, driven by OpenCL."""
    return device.startswith("CL") and gpu_driver.opencl_is_processor(_opened(device))


def _opened(device: str) -> Any:
    # While tinygrad generates code it forbids this, although the device may long be open.
    with Context(ALLOW_DEVICE_USAGE=1):
        return Device[device]


def language(tensor: Tensor) -> tuple[Dialect, DType]:
    """The dialect of the GPU that a tensor lies on, and the name of its type."""
    dialect = dialect_of(tensor.device)
    assert dialect is not None
    return dialect, TYPE_NAME[tensor.dtype]


def fragments(dialect: Dialect, dtype: DType) -> int:
    """FRAGMENT of common.h: which instructions multiply."""
    if dialect == "cuda":
        return TF32X3 if dtype == "float32" else MMA16
    return SIMDGROUP if dialect == "metal" else FMA


@functools.cache
def limits_of(device: str) -> Limits:
    """What a launch may use on this device: on OpenCL as much local memory as its driver grants."""
    dialect = dialect_of(device)
    assert dialect is not None
    least = LIMITS[dialect]
    if dialect != "opencl":
        return least
    granted = gpu_driver.opencl_local_bytes(_opened(device))
    return dataclasses.replace(least, shared_bytes=max(granted, least.shared_bytes))


@functools.cache
def multiprocessors(device: str) -> int:
    """How many parts of a device run blocks side by side; of the device NULL, as on its model."""
    opened = _opened(device)
    dialect = dialect_of(device)
    if dialect == "opencl":
        return gpu_driver.opencl_compute_units(opened)
    if dialect == "cuda" and not device.startswith("NULL"):
        return gpu_driver.cuda_multiprocessors(opened)
    return MULTIPROCESSORS.get(opened.renderer.target.arch, 16)


def itemsize(dtype: DType) -> int:
    """Bytes of an element."""
    return 4 if dtype == "float32" else 2


def launch(
    kernel: str,
    dialect: Dialect,
    macros: Mapping[str, int | str],
    *,
    name: str,
    dtype: DType,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[str],
    flops: int,
    fragment: int = FMA,
    shared_bytes: int = 0,
    min_blocks: int = 1,
    updates: bool = False,
    headers: Sequence[str] = ("tile.h",),
    limits: Limits | None = None,
    products: Sequence[int] = (),
) -> Launch:
    """The launch of `ops/gpu/<kernel>.c`, whose text is put together here.

    name: of the function. dtype: TYPE of the text, its activations. grid: blocks, whose first and
    third numbers are bx and bz. arguments: names of the buffers, outputs first. shared_bytes: per
    block. min_blocks: per multiprocessor, which limits registers on CUDA. headers: files of
    ops/gpu/ after the dialect's. products: those of sizes that the text computes in 32 bits.

    Raises UnsupportedSize if the device does not allow as much.
    """
    limits = limits or LIMITS[dialect]
    for found, allowed, what in (
        (shared_bytes, limits.shared_bytes, "bytes of shared memory per block"),
        (threads, limits.threads, "threads per block"),
        (len(arguments), limits.buffers, "buffers"),
        (grid[2], LAYERS[dialect], "blocks along z"),
        (max(*_sizes(macros), *grid[:2], *products), LARGEST - 1, "as a size"),
    ):
        if allowed is not None and found > allowed:
            raise UnsupportedSize(f"{kernel}: {found} {what}; {dialect} allows {allowed}")
    dynamic = dialect == "cuda" and shared_bytes > LIMITS["cuda"].shared_bytes
    more: dict[str, int | str] = {
        "NAME": name, "TYPE": TYPE_CODE[dtype], "FRAGMENT": fragment, "THREADS": threads,
        "MIN_BLOCKS": min_blocks,
    }  # fmt: skip
    if dynamic:
        more["DYNAMIC"] = 1
    text = complete(kernel, dialect, {**more, **macros}, headers)
    return Launch(
        name, text, grid, threads, shared_bytes, tuple(arguments), flops,
        dynamic_bytes=shared_bytes * dynamic, updates=updates,
    )  # fmt: skip


def _sizes(macros: Mapping[str, int | str]) -> list[int]:
    """Numbers among a text's macros that have 32 bits."""
    return [n for name, n in macros.items() if isinstance(n, int) and name not in WIDE_MACROS]


def run(
    launch: Launch,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradient: Gradient | None = None,
) -> list[Tensor]:
    """Run a kernel as NAME(outputs..., inputs...) in blocks of threads; returns what it wrote.

    outputs are buffers to write: `empty(...)`, or existing tensors that are updated in place, which
    `launch.updates` must say. All lie on one GPU.
    """
    tensors = [*outputs, *inputs]
    assert len(tensors) == len(launch.arguments), launch.arguments
    device = outputs[0].device
    everything = tuple(range(len(tensors)))
    program = ProgramInfo(
        launch.name,
        launch.grid,
        (launch.threads, 1, 1),
        globals=everything,
        outs=everything[: len(outputs)],
        ins=everything[0 if launch.updates else len(outputs) :],
        aux=_further_arguments(device, launch, tensors),
    )
    return common.run(program, launch.text, launch.flops, outputs, inputs, gradient)


def _further_arguments(device: str, launch: Launch, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tinygrad 0.13 passes to the constructor of a program besides its text."""
    if device.startswith("CL"):  # the type of each argument
        return (tuple(((i, t.dtype.ptr(t.numel())),) for i, t in enumerate(tensors)),)
    return (launch.dynamic_bytes,) if launch.dynamic_bytes else ()


def complete(
    kernel: str, dialect: Dialect, macros: Mapping[str, int | str], headers: Sequence[str]
) -> str:
    """The whole text of a kernel: its macros, then the files in their order."""
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    if dialect == "metal":  # whose library has names such as D and T
        lines.insert(0, "#include <metal_stdlib>")
    files = ("common.h", f"{dialect}.h", *headers, f"{kernel}.c")
    return "\n".join(lines) + "\n" + "".join(source(file) for file in files)


@functools.cache
def source(file: str) -> str:
    """Text of a file of `ops/gpu/`."""
    return (resources.files("tinyllama.ops") / "gpu" / file).read_text(encoding="utf-8")
