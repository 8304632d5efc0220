"""C kernels inside tinygrad's graph, for the CPU: assembled here, compiled and run by tinygrad.

A kernel is a C file of `ops/cpu/` that macros complete. tinygrad compiles it with clang, caches
the object by its text, and calls it on every thread with that thread's number (`core_id`). See
`ops/cpu/common.h` for the rules that a kernel follows.

Sizes that the compiler need not know are constants of the object that are written when it is
loaded (patches/kernel_sizes.py), so that clang runs once for all sizes.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import ProgramInfo, UOp

from tinyllama.runtime import kernel as common
from tinyllama.runtime.kernel import Gradient
from tinyllama.runtime.patches.kernel_sizes import MARK
from tinyllama.system import device, processor


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


def run(
    kernel: Kernel,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradient: Gradient | None = None,
) -> list[Tensor]:
    """Run a kernel as KERNEL(outputs..., inputs..., core_id); returns the written outputs.

    outputs are buffers to write: `empty(...)`, or existing tensors that are updated in place.
    """
    launch = _launch(kernel, len(outputs), len(inputs))
    return common.run(launch, kernel.text(), kernel.flops, outputs, inputs, gradient)


def reading(call: UOp, place: int, tensor: Tensor, kernel: Kernel) -> UOp:
    """The call of a kernel as one of `kernel`, which reads `tensor` as its input number `place`."""
    outputs, inputs = map(len, common.buffers_of(call))
    launch = _launch(kernel, outputs, inputs)
    return common.reading(call, place, tensor, launch, kernel.text(), kernel.flops)


def _launch(kernel: Kernel, outputs: int, inputs: int) -> ProgramInfo:
    sizes, threads = tuple(kernel.sizes.values()), device.threads()
    core = UOp.variable("core_id", 0, threads - 1, dtypes.int)
    reads = tuple(range(0 if kernel.updates else outputs, outputs + inputs))
    return ProgramInfo(
        _joined(kernel.file, (*sizes, *kernel.defines.values())),
        (threads, 1, 1), (1, 1, 1), (core,), tuple(range(outputs + inputs)),
        tuple(range(outputs)), reads, sizes,
    )  # fmt: skip


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


def _joined(file: str, values: Iterable[int | float | str]) -> str:
    """A C name of a file's name and the values of macros."""
    text = "_".join([file.removesuffix(".c"), *map(str, values)])
    return "".join(c if c.isalnum() else "_" for c in text)


def per_thread(width: int) -> Tensor:
    """A buffer with one row of `width` floats for each thread."""
    return common.empty(device.threads(), width, device="CPU")
