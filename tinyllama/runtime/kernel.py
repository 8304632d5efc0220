"""Kernels of our own inside tinygrad's graph: what those for the CPU and for a GPU share.

A kernel is a text that tinygrad compiles for a device and caches. `runtime/c_kernel.py` completes
and launches those of the CPU, one call per thread; `runtime/blocks.py` those of a GPU, in blocks of
threads. Both read and write flat memory: buffers in, buffers out.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.function import function
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

from tinyllama.runtime import sources
from tinyllama.runtime.patches import install

# Kernels index rows, columns and blocks with 32 bits; elements of whole tensors have 64. Each size,
# and each product of sizes that a kernel computes in 32 bits, is less than this, and what is added
# before an index is clipped much less than as much again (tests/proofs/test_index_types.py).
LARGEST = 1 << 30
# Type codes shared with ops/cpu/common.h and ops/gpu/common.h.
TYPE_CODE = {dtypes.float32: 0, dtypes.bfloat16: 1, dtypes.float16: 2}


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
    launch: ProgramInfo,
    code: str,
    flops: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradient: Gradient | None = None,
) -> list[Tensor]:
    """Run a text as tinygrad's PROGRAM on the outputs' device, whose compiler takes it.

    Its arguments are outputs, inputs and the variables of `launch`. Returns the written outputs.
    `flops` are the floating-point operations of one run, for tinygrad's statistics.
    """
    install()
    tensors = [_flat(t) for t in (*outputs, *inputs)]
    results = Tensor.custom_kernel(
        *tensors,
        fxn=functools.partial(_program, launch, code, flops, [t.uop for t in tensors]),
        grad_fxn=gradient and _kernel_gradient(gradient, outputs, inputs),
    )
    if sources.tracking():
        sources.noted(results, launch.name)
    return [r.reshape(t.shape) for r, t in zip(results, outputs, strict=False)]


def reading(
    call: UOp, place: int, tensor: Tensor, launch: ProgramInfo, code: str, flops: int
) -> UOp:
    """The call of a kernel with another text, which reads `tensor` as its input number `place`."""
    buffers = list(call.src[1:])
    buffers[len(call.src[0].arg.outs) + place] = _flat(tensor).uop
    placeholders = [UOp.placeholder_like(b, slot=i) for i, b in enumerate(buffers)]
    program = _program(launch, code, flops, buffers, *placeholders)
    return call.replace(src=(program, *buffers))


def _program(
    launch: ProgramInfo, code: str, flops: int, buffers: Sequence[UOp], *placeholders: UOp
) -> UOp:
    """tinygrad's PROGRAM of a text, with what stands in it for its arguments, `buffers`."""
    moved = sum(b.numel() * b.dtype.itemsize for b in buffers)
    info = KernelInfo(name=launch.name, estimates=Estimates(ops=flops, lds=moved, mem=moved))
    sink = UOp.sink(*placeholders, *launch.vars, arg=info)
    linear = UOp(Ops.LINEAR, src=(*sink.src, sink))
    device = UOp(Ops.DEVICE, arg=buffers[0].device)
    return UOp(Ops.PROGRAM, src=(sink, device, linear, UOp(Ops.SOURCE, arg=code)), arg=launch)


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
        with sources.made_for(call, backward=True):
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
        with sources.made_for(call, backward=True):
            grads = gradient(Tensor(grad), Call(outputs, [Tensor(u) for u in call.src[1:]]))
        return tuple(None if g is None else g.uop for g in grads)

    run: Callable[..., Any] = function(forward, grad_fxn=run_gradient)
    return _noting(run, forward.__name__) if sources.tracking() else run


def _noting(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`run`, whose lines are noted."""

    def run_and_note(*inputs: Tensor) -> Any:
        result = run(*inputs)
        outputs = [result] if isinstance(result, Tensor) else result
        sources.noted([Tensor(output.uop.src[0]) for output in outputs], name)
        return result

    return run_and_note


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


def _flat(tensor: Tensor) -> Tensor:
    """As `written`, on a GPU also for what tinygrad's own kernels write to memory."""
    uop = tensor.uop
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    if uop.op is Ops.CONTIGUOUS and tensor.device != "CPU":
        return Tensor(uop)
    return written(tensor)


def after(tensor: Tensor, done: Sequence[Tensor]) -> Tensor:
    """The memory of `tensor`, to be written again after the kernels that wrote `done` have run."""
    place, uops = written(tensor).uop, [written(t).uop for t in done]
    if any(uop.op is not Ops.AFTER for uop in (place, *uops)):
        return tensor
    return Tensor(place.after(*(uop.src[1] for uop in uops))).reshape(tensor.shape)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, written to memory unless a kernel has done so already."""
    return tensor if written(tensor).uop.op is Ops.AFTER else tensor.contiguous()


def empty_like(*tensors: Tensor) -> list[Tensor]:
    """New buffers for a kernel to write, of the shapes, types and devices of tensors."""
    return [empty(*t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def empty(*shape: int, device: str, dtype: DType = dtypes.float32) -> Tensor:
    """A new buffer for a kernel to write; the layout of the step gives it memory."""
    return Tensor.invalids(*shape, dtype=dtype, device=device)
