"""Captured steps on OpenCL, put into the queue by one native call.

tinygrad 0.13 has no graphs for OpenCL: it sets the arguments of each kernel and starts it from
Python, at every step. Here each launch of a captured step has a cl_kernel of its own, whose
arguments are set once; `enqueue.c` then puts them all into the queue. What changes from call to
call, input tensors and the values of variables, is set before.

tinygrad's own way is used for the rest: kernels on images, sizes of launches that vary, kernels
timed one by one (DEBUG=2, PROFILE=1).
"""

import ctypes
import functools
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from tinygrad.device import Compiled, Device
from tinygrad.dtype import ImageDType
from tinygrad.engine.jit import GraphRunner
from tinygrad.uop.ops import UOp

from tinyllama.runtime import timing
from tinyllama.runtime.cpu import clang_compiles, cpu_device

LAUNCH_WORDS = 7  # struct launch of enqueue.c: the kernel, threads in all, threads per block


class QueueGraph(GraphRunner):  # type: ignore[misc]  # tinygrad.engine is untyped
    """A batch of kernels, called as tinygrad calls its graphs: with inputs and variables."""

    def __init__(self, batch: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        from tinygrad.runtime.autogen import opencl

        super().__init__(batch, input_uops)
        self.opencl, self.opened = opencl, Device[self.calls[0][2][0].device]
        self.kernels: list[Any] = []
        words: list[int] = []
        for (_, program, buffers, fixed), runtime in zip(self.calls, self.runtimes, strict=True):
            self.kernels.append(self._kernel(runtime))
            values = [fixed.get(variable.expr, 0) for variable in program.arg.vars]
            self._set(len(self.kernels) - 1, enumerate(b._buf for b in buffers))
            self._set_values(len(self.kernels) - 1, len(buffers), values)
            words += _launch(self.kernels[-1], program.arg)
        self.launches = (ctypes.c_uint64 * len(words))(*words)
        self.recorder = timing.recorder()
        self.names = () if self.recorder is None else timing.kernels_of(self)
        # The memory object that stands at each place of an input, to set it only where it changed.
        self.inputs: dict[tuple[int, int], Any] = {}

    @staticmethod
    def supports_uop(batch_devs: list[Compiled], new_call: UOp) -> bool:
        """Whether a batch on these devices can hold this kernel."""
        if not GraphRunner.supports_uop(batch_devs, new_call):
            return False
        info = new_call.src[0].arg
        sizes = (*(info.global_size or ()), *(info.local_size or ()))
        types = [dtype for argument in info.aux[0] for _, dtype in argument]
        whole = all(isinstance(size, int) for size in sizes)
        return whole and not any(isinstance(dtype, ImageDType) for dtype in types)

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        """Put the batch into the device's queue; with `wait`, the seconds until it was done."""
        self._set_inputs(input_uops)
        for number, place, value in self.updated_vars(var_vals):
            self._set_values(number, len(self.calls[number][2]) + place, [value])
        if wait:
            self.opened.synchronize()
        begun = time.perf_counter()
        self._enqueue()
        if not wait:
            return None
        self.opened.synchronize()
        return time.perf_counter() - begun

    def __del__(self) -> None:
        for kernel in getattr(self, "kernels", ()):
            self.opencl.clReleaseKernel(kernel)

    def _kernel(self, runtime: Any) -> Any:
        """Another cl_kernel of a program: those of tinygrad hold the arguments of one launch."""
        status = ctypes.c_int32()
        name = runtime.name.encode()
        kernel = self.opencl.clCreateKernel(runtime.program, name, status)
        _check("clCreateKernel", runtime.name, status.value)
        return kernel

    def _set_inputs(self, input_uops: tuple[UOp, ...]) -> None:
        for number, replaced in enumerate(self.uop_replace):
            for place, index in replaced:
                memory = input_uops[index].buffer._buf
                if self.inputs.get((number, place)) is not memory:
                    self.inputs[number, place] = memory
                    self._set(number, [(place, memory)])

    def _set(self, number: int, arguments: Any) -> None:
        for place, memory in arguments:
            size = ctypes.sizeof(memory)
            self._set_argument(number, place, size, ctypes.byref(memory))

    def _set_values(self, number: int, place: int, values: Sequence[int]) -> None:
        for value in values:
            self._set_argument(number, place, 4, ctypes.byref(ctypes.c_int32(value)))
            place += 1

    def _set_argument(self, number: int, place: int, size: int, value: Any) -> None:
        status = self.opencl.clSetKernelArg(self.kernels[number], place, size, value)
        _check("clSetKernelArg", self.runtimes[number].name, status)

    def _enqueue(self) -> None:
        failed, begun = ctypes.c_uint64(), time.perf_counter()
        events = None if self.recorder is None else (ctypes.c_void_p * len(self.kernels))()
        call = _address(self.opencl.dll.clEnqueueNDRangeKernel)
        queue, count = self.opened.queue, len(self.kernels)
        status = _native()(call, queue, self.launches, count, ctypes.byref(failed), events)
        _check("clEnqueueNDRangeKernel", self.runtimes[failed.value].name, status)
        self.opencl.clFlush(queue)  # so that the device begins
        if self.recorder is not None:
            self.recorder.add(functools.partial(self._decoded, events, begun))

    def _decoded(self, events: Any, begun: float, which: timing.Which | None) -> list[timing.Run]:
        """The runs of a batch that has ended, whose first kernel was put into the queue at `begun`
        and which the device's own clock measured."""
        cl, runs, base = self.opencl, [], None
        for kernel, address in zip(self.names, events, strict=True):
            event = ctypes.cast(ctypes.c_void_p(address), cl.cl_event)
            queued, first, last = (
                self._moment(event, at)
                for at in (
                    cl.CL_PROFILING_COMMAND_QUEUED, cl.CL_PROFILING_COMMAND_START,
                    cl.CL_PROFILING_COMMAND_END,
                )
            )  # fmt: skip
            base = queued if base is None else base
            runs.append(timing.Run(kernel, begun + first - base, begun + last - base))
            cl.clReleaseEvent(event)
        return [run for run in runs if which is None or which(run.kernel)]

    def _moment(self, event: Any, which: int) -> float:
        """Seconds of the device's clock at a moment of an event."""
        moment = ctypes.c_uint64()
        status = self.opencl.clGetEventProfilingInfo(event, which, 8, ctypes.byref(moment), None)
        _check("clGetEventProfilingInfo", "a kernel", status)
        return float(moment.value * 1e-9)


def _launch(kernel: Any, info: Any) -> list[int]:
    """The words of a struct launch."""
    blocks = (*info.global_size, 1, 1)[:3]
    threads = (*info.local_size, 1, 1)[:3] if info.local_size else None
    total = [b * t for b, t in zip(blocks, threads or (1, 1, 1), strict=True)]
    return [_address(kernel), *total, *(threads or (0, 0, 0))]


def _address(pointer: Any) -> int:
    return int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)


def _check(call: str, kernel: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{call} of {kernel}: OpenCL error {status}")


def can_enqueue() -> bool:
    """Whether enqueue.c compiles here."""
    return clang_compiles()


@functools.cache
def _native() -> Any:
    """The function of enqueue.c; the program's memory lives as long as the process."""
    cpu = cpu_device()
    text = (resources.files("tinyllama.runtime") / "enqueue.c").read_text()
    program = cpu.runtime("enqueue", cpu.compiler.compile_cached("#define KERNEL enqueue\n" + text))
    pointer = ctypes.c_void_p
    types = (pointer, pointer, pointer, ctypes.c_uint64, pointer, pointer)
    function: Any = ctypes.CFUNCTYPE(ctypes.c_int, *types)(_address(program.fxn))
    function.program = program
    return function
