"""What a captured step costs, counted without running it: launches, operations, bytes, registers.

The step is captured as it would be for training (runtime/plan.py), on any device that tinygrad
writes texts for: `DEV=NULL:CUDA:sm_90` stands for a card that is not there. With NVRTC its kernels
are compiled too, and their machine code says what they take.

Operations are those that a kernel declares: our own declare the operation's (2 M N K of a product),
tinygrad's are counted in its text. Bytes are those of a launch's different buffers, each once,
whether it is read, written or both; what a cache saves or a kernel reads again is not known.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor
from tinygrad.device import Device
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import cubin, precompile
from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.cubin import CubinCompiler
from tinyllama.runtime.plan import recorded
from tinyllama.runtime.sources import plain_name

# Our own kernels that are products: what their texts begin with.
_PRODUCTS = ("gemm", "attention")
# Multiplied by tensor cores (CUDA: 1, 2) or matrix instructions (Metal: 3); see ops/gpu/common.h.
_FRAGMENTS = re.compile(r"^#define FRAGMENT [123]$", re.MULTILINE)
# Below this, a sum of products is a sum over rows and no product of matrices.
_PRODUCT_FLOPS_PER_BYTE = 4


@dataclass(frozen=True)
class Launch:
    """One kind of kernel in a step: equal text and equal buffers' sizes."""

    name: str
    times: int
    flops: int  # of one launch
    nbytes: int  # of the different buffers of one launch
    is_product: bool
    on_tensor_cores: bool
    text: str
    blocks: tuple[int, ...]
    threads: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a step's kernels takes, at most."""

    kernels: int  # different ones
    seconds: float  # of processor time, to compile all
    spilled_bytes: int  # per thread
    shared_bytes: int  # per block
    registers: int
    spilling: tuple[str, ...]  # names of kernels that spill


@dataclass(frozen=True)
class Account:
    """A step's launches, and what follows from them."""

    launches: tuple[Launch, ...]
    compiled: Compiled | None  # where machine code can be made

    @property
    def kernels(self) -> int:
        return sum(launch.times for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.times * launch.flops for launch in self.launches)

    @property
    def nbytes(self) -> int:
        return sum(launch.times * launch.nbytes for launch in self.launches)

    @property
    def tensor_core_share(self) -> float:
        """Of the operations of all products, the part in kernels that use tensor cores."""
        products = [launch for launch in self.launches if launch.is_product]
        total = sum(launch.times * launch.flops for launch in products)
        on_cores = sum(launch.times * launch.flops for launch in products if launch.on_tensor_cores)
        return on_cores / total if total else 0.0

    def table(self, count: int = 25) -> str:
        """The launches that move most bytes, as text, for developers."""
        lines = [f"{'kernel':50} {'times':>5} {'GFLOP':>9} {'GB':>7}  blocks, threads"]
        for launch in sorted(self.launches, key=lambda at: -at.times * at.nbytes)[:count]:
            lines.append(
                f"{launch.name[:50]:50} {launch.times:5} {launch.times * launch.flops / 1e9:9.2f} "
                f"{launch.times * launch.nbytes / 1e9:7.3f}  {launch.blocks} {launch.threads}"
                f"{' TC' * launch.on_tensor_cores}"
            )
        return "\n".join(lines)


def account(
    function: Callable[..., Any], inputs: Sequence[Tensor], compiling: bool = False
) -> Account:
    """The account of the step `function(*inputs)`; nothing runs and nothing is allocated.

    With `compiling`, its kernels are compiled as well, without the cache, if that makes machine
    code here.
    """
    install()
    pieces, _ = recorded(function, inputs)
    calls = [call for piece in pieces for call in piece.src if call.src[0].op in _KERNELS]
    counts: dict[tuple[UOp, int], int] = {}
    for call in calls:
        key = call.src[0], _bytes(call)
        counts[key] = counts.get(key, 0) + 1
    devices = {call.src[0]: call.device for call in calls}
    launches = [
        _launch(kernel, str(devices[kernel]), times, nbytes)
        for (kernel, nbytes), times in counts.items()
    ]
    return Account(tuple(launches), _compile(launches, devices.values()) if compiling else None)


_KERNELS = (Ops.PROGRAM, Ops.SINK)


def _launch(kernel: UOp, device: str, times: int, nbytes: int) -> Launch:
    ours = kernel.op is Ops.PROGRAM
    program = kernel if ours else precompile.program(device, kernel)
    name = plain_name(program.arg.name)
    flops, text = int(program.src[0].arg.estimates.ops), program.src[3].arg
    if ours:
        is_product = name.startswith(_PRODUCTS)
        on_tensor_cores = is_product and bool(_FRAGMENTS.search(text))
    else:
        is_product = flops > _PRODUCT_FLOPS_PER_BYTE * nbytes and _sums_products(kernel)
        on_tensor_cores = "mma.sync" in text
    info = program.arg
    blocks, threads = tuple(info.global_size or ()), tuple(info.local_size or ())
    return Launch(
        name, times, flops, nbytes, is_product, on_tensor_cores, text, blocks, threads
    )  # fmt: skip


def _sums_products(sink: UOp) -> bool:
    """Whether a kernel that tinygrad writes adds up products of numbers."""
    return any(
        u.op is Ops.REDUCE and u.arg[0] is Ops.ADD and _without_casts(u.src[0]).op is Ops.MUL
        for u in sink.toposort()
    )


def _without_casts(uop: UOp) -> UOp:
    return _without_casts(uop.src[0]) if uop.op is Ops.CAST else uop


def _bytes(call: UOp) -> int:
    """Bytes of the different buffers of a call; slices of one buffer that overlap count once."""
    spans: dict[UOp, list[tuple[int, int]]] = {}
    for uop in call.src[1:]:
        if uop.op is not Ops.BIND:
            buffer, start, size = _span(uop)
            spans.setdefault(buffer, []).append((start, start + size))
    return sum(map(_covered, spans.values()))


def _span(uop: UOp) -> tuple[UOp, int, int]:
    """A buffer, and the first byte and the number of bytes of it that an argument stands for."""
    if uop.op is Ops.BUFFER_VIEW:
        buffer, start, _ = _span(uop.src[0])
        size, offset = uop.arg
        return buffer, start + offset * uop.dtype.itemsize, size * uop.dtype.itemsize
    return uop, 0, int(uop.arg * uop.dtype.itemsize)


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    total = end = 0
    for first, last in sorted(spans):
        total += max(last, end) - max(first, end)
        end = max(last, end)
    return total


def _compile(launches: Sequence[Launch], devices: Iterable[Any]) -> Compiled | None:
    (device,) = {str(device) for device in devices}
    compiler = Device[device].renderer.compiler
    if not isinstance(compiler, CubinCompiler):
        return None
    names = {launch.text: launch.name for launch in launches}

    def timed(text: str) -> tuple[bytes, float]:
        began = time.thread_time()
        return compiler.compile(text), time.thread_time() - began

    made, seconds = zip(*precompile.pool().map(timed, names), strict=True)
    spilled = [cubin.spilled_bytes(code) for code in made]
    return Compiled(
        kernels=len(made),
        seconds=sum(seconds),
        spilled_bytes=max(spilled),
        shared_bytes=max(map(cubin.shared_bytes, made)),
        registers=max(cubin.attributes(code)[cubin.REGISTERS] for code in made),
        spilling=tuple(n for n, size in zip(names.values(), spilled, strict=True) if size),
    )
