"""C kernels inside tinygrad's graph: assembled here, compiled and run by tinygrad itself.

A kernel is a C file of `ops/cpu/` that macros complete. tinygrad compiles it with clang, caches
the object by its text, plans its memory, and calls it on every thread with that thread's number
(`core_id`). See `ops/cpu/common.h` for the rules a kernel obeys.

Sizes that a kernel does without at compile time are constants of its object that are put in when
it is loaded, so that clang runs once for all sizes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

from tinyllama.runtime.cpu import clang_compiles
from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.kernel_sizes import MARK
from tinyllama.system import device, processor

Form = Literal["portable", "cpu"]
_forced: list[Form] = []

# Type codes shared with ops/cpu/common.h.
TYPE_CODE = {dtypes.float32: 0, dtypes.bfloat16: 1, dtypes.float16: 2}


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """Make every operation take one form, whatever the device. For tests and benchmarks."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether the CPU kernels apply: tensors on the CPU, compiled by clang, not switched off."""
    install()
    if _forced:
        return _forced[-1] == "cpu"
    if any(t.device != "CPU" or t.dtype not in TYPE_CODE for t in tensors):
        return False
    return device.kernels_enabled() and clang_compiles()


def has_bf16_products() -> bool:
    """Whether kernels multiply bfloat16 as it is; elsewhere it is storage alone."""
    return processor.multiplies_bf16(device.instruction_set())


def has_amx() -> bool:
    """Whether they do so in AMX."""
    return device.instruction_set() == "AMX"


@functools.cache
def source(file: str) -> str:
    """Text of a file of `ops/cpu/`."""
    return (resources.files("tinyllama.ops") / "cpu" / file).read_text()


def run(
    file: str,
    defines: Mapping[str, int | float | str],
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    sizes: Mapping[str, int] = MappingProxyType({}),
    flops: int = 0,
    also_read: bool = False,
    headers: Sequence[str] = (),
    gradient: Callable[..., tuple[UOp | None, ...]] | None = None,
) -> list[Tensor]:
    """Run one C kernel: KERNEL(outputs..., inputs..., core_id). Returns the written outputs.

    `defines` are macros, `sizes` too, but of numbers that the compiler does not know.
    outputs are buffers to write (`empty(...)`, or existing tensors that are updated in place, then
    `also_read`). gradient(*grads, call=) returns one UOp or None for each output and input.
    """
    code = _source(file, headers, defines, sizes)
    name = "_".join([file.removesuffix(".c"), *map(_word, (*sizes.values(), *defines.values()))])
    install()
    moved = sum(t.numel() * t.dtype.itemsize for t in (*outputs, *inputs))
    writes = tuple(range(len(outputs)))
    reads = tuple(range(0 if also_read else len(outputs), len(outputs) + len(inputs)))
    info = KernelInfo(name=name, estimates=Estimates(ops=flops, lds=moved, mem=moved))
    places = [written(t) for t in (*outputs, *inputs)]
    results = Tensor.custom_kernel(
        *places,
        fxn=lambda *buffers: _program(info, code, buffers, writes, reads, tuple(sizes.values())),
        grad_fxn=None if gradient is None else _shaped(gradient),
    )
    return [r.reshape(t.shape) for r, t in zip(results, outputs, strict=False)]


def _source(
    file: str,
    headers: Sequence[str],
    defines: Mapping[str, int | float | str],
    sizes: Mapping[str, int],
) -> str:
    """C text of a kernel: sizes and macros, the headers, the file."""
    name = "_".join([file.removesuffix(".c"), *map(_word, defines.values())])
    macros = {"NT": device.threads(), **defines, "KERNEL": name}
    lines = [f"#define {key} {value}" for key, value in macros.items()]
    return "\n".join([*_declared(sizes), *lines, *map(source, ("common.h", *headers, file))])


def _declared(sizes: Mapping[str, int]) -> list[str]:
    """C lines that make each size a constant of the object whose number the compiler cannot see."""
    if not sizes:
        return []
    words = [".section .rodata", ".balign 8", f".quad {MARK:#x}"]
    lines = []
    for key, value in sizes.items():
        lines.append(f'extern const long size_{key} __attribute__((visibility("hidden")));')
        cast = "(int)" if value < 1 << 31 else ""
        lines.append(f"#define {key} ({cast}size_{key})")
        words.append(f"size_{key}: .quad 0")
    text = "\\n".join([*words, ".text"])
    lines.append(f'__asm__("{text}");')
    return lines


def _program(
    info: KernelInfo,
    code: str,
    buffers: tuple[UOp, ...],
    writes: tuple[int, ...],
    reads: tuple[int, ...],
    sizes: tuple[int, ...],
) -> UOp:
    """A C text as tinygrad's PROGRAM, run once by each thread with its number."""
    threads = device.threads()
    core = UOp.variable("core_id", 0, threads - 1, dtypes.int)
    everything = tuple(range(len(buffers)))
    launch = ProgramInfo(
        info.name, (threads, 1, 1), (1, 1, 1), (core,), everything, writes, reads, sizes
    )  # fmt: skip
    sink = UOp.sink(*buffers, core, arg=info)
    linear = UOp(Ops.LINEAR, src=(*sink.src, sink))
    parts = (sink, UOp(Ops.DEVICE, arg="CPU"), linear, UOp(Ops.SOURCE, arg=code))
    return UOp(Ops.PROGRAM, src=parts, arg=launch)


def _shaped(
    gradient: Callable[..., tuple[UOp | None, ...]],
) -> Callable[..., tuple[UOp | None, ...]]:
    """`gradient`, each result in the shape of the buffer that it belongs to."""

    def run_gradient(*grads: UOp, call: UOp | None = None) -> tuple[UOp | None, ...]:
        # tinygrad passes the call by position where one output has a gradient, by name otherwise.
        *grads_in, node = grads if call is None else (*grads, call)
        pairs = zip(gradient(*grads_in, call=node), node.src[1:], strict=True)
        return tuple(None if g is None else g.reshape(source.shape) for g, source in pairs)

    return run_gradient


def written(tensor: Tensor) -> Tensor:
    """What a kernel wrote, without the reshapes behind it, which tinygrad would copy for.

    Kernels read flat memory, so a shape is nothing to them. Other tensors come back as they are.
    """
    uop = tensor.uop
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return Tensor(uop) if uop.op is Ops.AFTER else tensor


def after(tensor: Tensor, done: Sequence[Tensor]) -> Tensor:
    """What a kernel wrote, as memory that is free once the kernels that wrote `done` have run."""
    place, uops = written(tensor).uop, [written(t).uop for t in done]
    if any(uop.op is not Ops.AFTER for uop in (place, *uops)):
        return tensor
    return Tensor(place.after(*(uop.src[1] for uop in uops))).reshape(tensor.shape)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, put into memory unless a kernel has written it there already."""
    return tensor if written(tensor).uop.op is Ops.AFTER else tensor.contiguous()


def empty(*shape: int, dtype: DType = dtypes.float32) -> Tensor:
    """An anonymous buffer for a kernel to write; tinygrad's planner gives it memory."""
    return Tensor.invalids(*shape, dtype=dtype, device="CPU")


def _word(value: Any) -> str:
    """A macro's value as part of a C name."""
    return "".join(c if c.isalnum() else "_" for c in str(value))


def threaded(width: int) -> Tensor:
    """A buffer with one row of `width` floats for each thread's partial sum."""
    return empty(device.threads(), width)
