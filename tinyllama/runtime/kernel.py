"""C kernels inside tinygrad's graph: assembled here, compiled and run by tinygrad.

A kernel is a C file of `ops/cpu/` that macros complete. tinygrad compiles it with clang, caches
the object by its text, and calls it on every thread with that thread's number (`core_id`). See
`ops/cpu/common.h` for the rules that a kernel follows.

Sizes that the compiler need not know are constants of the object that are written when it is
loaded (patches/kernel_sizes.py), so that clang runs once for all sizes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.function import function
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.kernel_sizes import MARK
from tinyllama.system import device, processor

# Type codes shared with ops/cpu/common.h.
TYPE_CODE = {dtypes.float32: 0, dtypes.bfloat16: 1, dtypes.float16: 2}


def has_bf16_products() -> bool:
    """Whether kernels multiply bfloat16 directly; otherwise they widen it to float32 first."""
    return processor.multiplies_bf16(device.instruction_set())


def has_amx() -> bool:
    """Whether kernels multiply bfloat16 in AMX."""
    return device.instruction_set() == "AMX"


@functools.cache
def source(file: str) -> str:
    """Text of a file of `ops/cpu/`."""
    return (resources.files("tinyllama.ops") / "cpu" / file).read_text()


@dataclass(frozen=True)
class Kernel:
    """A C file of `ops/cpu/` and what completes it.

    `headers` are put before the file. `defines` are macros; `sizes` are too, but their numbers are
    put in when the kernel is loaded, so that the compiler does not know them. `flops` are the
    floating-point operations of one run, for tinygrad's statistics. With `updates` the kernel also
    reads its outputs.
    """

    file: str
    defines: Mapping[str, int | float | str]
    sizes: Mapping[str, int] = field(default_factory=dict)
    headers: Sequence[str] = ()
    flops: int = 0
    updates: bool = False

    @property
    def name(self) -> str:
        """The function's name in C; the same for all sizes."""
        return _joined(self.file, self.defines.values())

    def text(self) -> str:
        """The whole C text: sizes and macros, the headers, the file."""
        macros = {"NT": device.threads(), **self.defines, "KERNEL": self.name}
        lines = [f"#define {key} {value}" for key, value in macros.items()]
        files = map(source, ("common.h", *self.headers, self.file))
        return "\n".join([*_declared(self.sizes), *lines, *files])


@dataclass(frozen=True)
class Call:
    """A computation as its gradient sees it.

    outputs are what it wrote, inputs what it read, in the order and the shapes in which they were
    passed.
    """

    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]


# Gradient of the first output, the call -> a gradient for each input, or None.
Gradient = Callable[[Tensor, Call], Sequence[Tensor | None]]


def run(
    kernel: Kernel,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradient: Gradient | None = None,
) -> list[Tensor]:
    """Run a kernel as KERNEL(outputs..., inputs..., core_id); returns the written outputs.

    outputs are buffers to write: `empty(...)`, or existing tensors that are updated in place.
    """
    install()
    code, sizes = kernel.text(), tuple(kernel.sizes.values())
    name = _joined(kernel.file, (*sizes, *kernel.defines.values()))
    moved = sum(t.numel() * t.dtype.itemsize for t in (*outputs, *inputs))
    writes = tuple(range(len(outputs)))
    reads = tuple(range(0 if kernel.updates else len(outputs), len(outputs) + len(inputs)))
    info = KernelInfo(name=name, estimates=Estimates(ops=kernel.flops, lds=moved, mem=moved))
    places = [written(t) for t in (*outputs, *inputs)]
    results = Tensor.custom_kernel(
        *places,
        fxn=lambda *buffers: _program(info, code, buffers, writes, reads, sizes),
        grad_fxn=gradient and _kernel_gradient(gradient, outputs, inputs),
    )
    return [r.reshape(t.shape) for r, t in zip(results, outputs, strict=False)]


def _kernel_gradient(
    gradient: Gradient, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[..., tuple[UOp | None, ...]]:
    """`gradient` as tinygrad calls that of a kernel: with UOps of flat or other shapes."""
    # Not the tensors themselves, which would then live as long as the graph.
    output_shapes, input_shapes = [t.shape for t in outputs], [t.shape for t in inputs]

    def run_gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        wrote, read = buffers_of(call)
        # An output is read after the call wrote it, not before.
        outputs = _shaped([u.after(call) for u in wrote], output_shapes)
        grads = gradient(Tensor(grad), Call(outputs, _shaped(read, input_shapes)))
        pairs = zip(grads, read, strict=True)
        flat = [None if g is None else g.uop.reshape(buffer.shape) for g, buffer in pairs]
        return (*[None] * len(wrote), *flat)

    return run_gradient


def _shaped(uops: Iterable[UOp], shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
    return [Tensor(uop).reshape(shape) for uop, shape in zip(uops, shapes, strict=True)]


def with_gradient(
    forward: Callable[..., Tensor | tuple[Tensor, ...]], gradient: Gradient
) -> Callable[..., Any]:
    """A function of tensors whose gradient is computed by `gradient` instead of derived."""

    def run_gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        outputs = [Tensor(call.gettuple(place)) for place in range(len(call.src[0].src))]
        grads = gradient(Tensor(grad), Call(outputs, [Tensor(u) for u in call.src[1:]]))
        return tuple(None if g is None else g.uop for g in grads)

    return function(forward, grad_fxn=run_gradient)  # type: ignore[no-any-return]


def _declared(sizes: Mapping[str, int]) -> list[str]:
    """C lines that declare each size as a constant whose value the compiler does not know."""
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
    """A C text as tinygrad's PROGRAM, which each thread runs once with its number."""
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


def buffers_of(call: UOp) -> tuple[tuple[UOp, ...], tuple[UOp, ...]]:
    """The outputs and the inputs of a kernel's call, in the order in which they were passed."""
    outputs = len(call.src[0].arg.outs)  # after the kernel itself
    return call.src[1 : 1 + outputs], call.src[1 + outputs :]


def written(tensor: Tensor) -> Tensor:
    """What a kernel wrote, without reshapes, for which tinygrad would make a copy.

    Kernels read flat memory and do not see shapes. Other tensors are returned as they are.
    """
    uop = tensor.uop
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return Tensor(uop) if uop.op is Ops.AFTER else tensor


def after(tensor: Tensor, done: Sequence[Tensor]) -> Tensor:
    """The memory of `tensor`, to be written again after the kernels that wrote `done` have run."""
    place, uops = written(tensor).uop, [written(t).uop for t in done]
    if any(uop.op is not Ops.AFTER for uop in (place, *uops)):
        return tensor
    return Tensor(place.after(*(uop.src[1] for uop in uops))).reshape(tensor.shape)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, written to memory unless a kernel has done so already."""
    return tensor if written(tensor).uop.op is Ops.AFTER else tensor.contiguous()


def empty(*shape: int, dtype: DType = dtypes.float32) -> Tensor:
    """A new buffer for a kernel to write; the layout of the step gives it memory."""
    return Tensor.invalids(*shape, dtype=dtype, device="CPU")


def _joined(file: str, values: Iterable[int | float | str]) -> str:
    """A C name of a file's name and the values of macros."""
    text = "_".join([file.removesuffix(".c"), *map(str, values)])
    return "".join(c if c.isalnum() else "_" for c in text)


def per_thread(width: int) -> Tensor:
    """A buffer with one row of `width` floats for each thread."""
    return empty(device.threads(), width)
