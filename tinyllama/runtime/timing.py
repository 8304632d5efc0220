"""When each kernel of a captured step ran, recorded while recording.py is on and only then.

A step that is captured meanwhile measures its kernels at each call:

    CPU      stamps of the processor's counter by launch.c, per kernel and part
    OpenCL   the events of the queue (runtime/opencl.py)
    CUDA     events between the launches (`EventGraph`)
    others   each kernel is waited for (`WaitingGraph`)

Times are seconds of `time.perf_counter`. A step that is captured otherwise has none of this.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinygrad.device import Compiled, Device
from tinygrad.engine.jit import GraphRunner
from tinygrad.uop.ops import UOp, sym_infer

from tinyllama.runtime import sources


@dataclass(frozen=True)
class Kernel:
    """A launch of a step: what computes, how much, and where it comes from."""

    name: str
    lines: tuple[str, ...]  # "tinyllama/model/llama.py:60", the innermost first
    is_backward: bool
    flops: int
    nbytes: int  # of its different buffers


@dataclass(frozen=True)
class Part:
    """What one thread ran of a kernel."""

    thread: int
    begin: float
    end: float


@dataclass(frozen=True)
class Run:
    """One run of a kernel, from when its first part began until its last part ended."""

    kernel: Kernel
    begin: float
    end: float
    parts: tuple[Part, ...] = ()


Which = Callable[[Kernel], bool]
Decode = Callable[[Which | None], list[Run]]  # the runs of those kernels; of all for None
_MOST_BATCHES = 4096


class Recorder:
    """Collects the runs of kernels until they are taken; of many batches only the latest."""

    def __init__(self) -> None:
        self._undecoded: deque[Decode] = deque(maxlen=_MOST_BATCHES)

    def add(self, decode: Decode) -> None:
        """Note runs, which `decode` returns once the device has been waited for."""
        self._undecoded.append(decode)

    def take(self, which: Which | None = None) -> list[Run]:
        """The runs since the last call, of some kernels or of all, in the order of time.

        The device must be idle.
        """
        runs: list[Run] = []
        while self._undecoded:
            runs += self._undecoded.popleft()(which)
        return sorted(runs, key=lambda run: run.begin)


_recorders: list[Recorder] = []


def recorder() -> Recorder | None:
    """Where a step that is captured now notes its runs; None while nothing is recorded."""
    return _recorders[-1] if _recorders else None


@contextmanager
def collecting() -> Iterator[Recorder]:
    """Steps that are captured within note their runs in the recorder that this gives."""
    _recorders.append(Recorder())
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()


def kernels_of(graph: GraphRunner) -> tuple[Kernel, ...]:
    """What a batch launches, in its order."""
    return tuple(
        _kernel(call, program, buffers)
        for call, (_, program, buffers, _) in zip(graph.linear.src, graph.calls, strict=True)
    )


def _kernel(call: UOp, program: UOp, buffers: Sequence[Any]) -> Kernel:
    metadata, estimates = call.arg.metadata, program.src[0].arg.estimates
    spans = {(id(b.base), b.offset): b.nbytes for b in buffers}
    return Kernel(
        sources.plain_name(program.arg.name),
        sources.lines_of(metadata),
        sources.is_backward(metadata),
        int(sym_infer(estimates.ops, {})) if estimates else 0,
        sum(spans.values()),
    )


class _LaunchingGraph(GraphRunner):  # type: ignore[misc]  # tinygrad.engine is untyped
    """A batch of kernels that Python starts one by one."""

    def __init__(self, batch: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        super().__init__(batch, input_uops)
        self.recorder, self.kernels = recorder(), kernels_of(self)
        self.opened: Any = Device[self.calls[0][2][0].device]

    @staticmethod
    def supports_uop(batch_devs: list[Compiled], new_call: UOp) -> bool:
        """Whether a batch on these devices can hold this kernel."""
        return bool(GraphRunner.supports_uop(batch_devs, new_call))

    def _launches(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int]
    ) -> Iterator[Callable[..., float | None]]:
        """What starts each kernel; with wait=True it returns the seconds that the kernel took."""
        calls = zip(self.calls, self.runtimes, self.uop_replace, strict=True)
        for (_, program, buffers, fixed), runtime, replaced in calls:
            memory = [buffer._buf for buffer in buffers]
            for place, index in replaced:
                memory[place] = input_uops[index].buffer.ensure_allocated()._buf
            values = {**var_vals, **fixed}
            blocks, threads = program.arg.launch_dims(values)
            memory = [memory[place] for place in program.arg.globals]
            yield partial(
                runtime, *memory, global_size=blocks, local_size=threads,
                vals=program.arg.vals(values),
            )  # fmt: skip


class WaitingGraph(_LaunchingGraph):
    """Waits for each kernel: on devices whose queue we do not time."""

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        """Run the batch; with `wait`, the seconds it took."""
        self.opened.synchronize()
        runs = []
        for kernel, launch in zip(self.kernels, self._launches(input_uops, var_vals), strict=True):
            seconds = launch(wait=True) or 0.0
            end = time.perf_counter()
            runs.append(Run(kernel, end - seconds, end))
        if self.recorder is not None:
            self.recorder.add(partial(_chosen, runs))
        return sum(run.end - run.begin for run in runs) if wait else None


class EventGraph(_LaunchingGraph):
    """Puts an event between all kernels, as CUDA measures them."""

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        """Put the batch into the device's queue; with `wait`, the seconds it took."""
        from tinygrad.runtime.autogen import cuda

        launches = list(self._launches(input_uops, var_vals))
        events = [cuda.CUevent() for _ in range(len(launches) + 1)]
        for event in events:
            _check(cuda.cuEventCreate(ctypes.byref(event), 0))
        begun = time.perf_counter()
        _check(cuda.cuEventRecord(events[0], None))
        for launch, event in zip(launches, events[1:], strict=True):
            launch()
            _check(cuda.cuEventRecord(event, None))
        if self.recorder is not None:
            self.recorder.add(lambda which: _chosen(self._decoded(events, begun), which))
        if not wait:
            return None
        self.opened.synchronize()
        return time.perf_counter() - begun

    def _decoded(self, events: Sequence[Any], begun: float) -> list[Run]:
        from tinygrad.runtime.autogen import cuda

        runs, at, milliseconds = [], begun, ctypes.c_float()
        _check(cuda.cuEventSynchronize(events[-1]))
        for kernel, first, last in zip(self.kernels, events, events[1:], strict=False):
            _check(cuda.cuEventElapsedTime(ctypes.byref(milliseconds), first, last))
            runs.append(Run(kernel, at, at + milliseconds.value * 1e-3))
            at = runs[-1].end
        for event in events:
            _check(cuda.cuEventDestroy_v2(event))
        return runs


def _chosen(runs: list[Run], which: Which | None) -> list[Run]:
    return [run for run in runs if which is None or which(run.kernel)]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA's events: error {status}")
