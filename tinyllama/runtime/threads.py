"""Captured steps on the CPU, run by one native call per thread.

tinygrad 0.13 passes each CPU kernel to each thread through Python queues and ctypes, which takes
50 to 100 microseconds per kernel: half the time of a small model's step. Here the kernels of a
captured step stand in a table of addresses, and `launch.c` goes through it on all threads at once,
a microsecond or less per kernel. What changes from call to call, the addresses of input tensors and
the values of variables, is put into the table first. Both are commands in the device's own queue,
so tinygrad's order, waiting and timing still hold.

tinygrad's own way is used for the rest: kernels timed one by one (PROFILE=1), other compilers than
clang, several devices, launches of variable size; and with TINYLLAMA_KERNELS=0.
"""

import ctypes
import functools
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import PROFILE, mv_address
from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.runtime.ops_cpu import CPUComputeQueue
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import timing
from tinyllama.runtime.cpu import clang_compiles, cpu_device
from tinyllama.system import device

# Layout of `struct head` and `struct kernel` of launch.c, in 64-bit words.
LINE = 8
FIRST, KERNELS, TABLE, STAMPS, MOST = 0, 1, 2, 3, 4
OPEN, CLAIMS = LINE, 3 * LINE
KERNEL_WORDS = 5
MOST_ARGUMENTS = 128
NAP_SECONDS = 50e-6
_WORD = (1 << 64) - 1


def make_graph(batch: UOp, input_uops: tuple[UOp, ...] = ()) -> GraphRunner:
    """What runs a batch of a captured step's kernels; stands in for tinygrad's class HCQGraph."""
    native = device.kernels_enabled() and not PROFILE and clang_compiles()
    native = native and _can_launch(batch.src[0].src)
    other = HCQGraph if timing.recorder() is None else timing.WaitingGraph
    return (NativeGraph if native else other)(batch, input_uops)


make_graph.supports_uop = HCQGraph.supports_uop  # type: ignore[attr-defined]


def _can_launch(calls: Sequence[UOp]) -> bool:
    """Whether all are kernels for the first CPU device, of fixed size and few enough arguments."""
    for call in calls:
        places = [u for u in call.src[1:] if u.op is not Ops.BIND]
        if call.src[0].op is not Ops.PROGRAM or any(u.device != "CPU" for u in places):
            return False
        program = call.src[0].arg
        if len(places) + len(program.vars) > MOST_ARGUMENTS:
            return False
        if not all(isinstance(size, int) for size in program.global_size or ()):
            return False
    return True


@dataclass(frozen=True)
class _Kernel:
    """A kernel with its arguments; `core` is the place of the part's number among them."""

    program: Any
    arguments: list[int]
    core: int | None
    parts: int


class NativeGraph(GraphRunner):  # type: ignore[misc]  # tinygrad.engine is untyped
    """A batch of kernels, called as tinygrad calls its graphs: with inputs and variables."""

    def __init__(self, batch: UOp, input_uops: tuple[UOp, ...] = ()) -> None:
        super().__init__(batch, input_uops)
        self.cpu = cpu_device()
        kernels = [self._kernel(number) for number in range(len(self.calls))]
        self.recorder = timing.recorder()
        names = None if self.recorder is None else timing.kernels_of(self)
        self.timed = None if names is None else TimedTable(kernels, names)
        self.table = self.timed or Table(kernels)
        self.threads = min(max(k.parts for k in kernels), device.threads())
        self.inputs = [
            (self.table.starts[number] + place, index)
            for number, replaced in enumerate(self.uop_replace)
            for place, index in replaced
        ]
        # Variables come after the buffers; `var_vals_replace` counts variables alone.
        self.values = [
            (self.table.starts[number] + len(self.calls[number][2]) + place, self.vars[index])
            for number, replaced in self.var_vals_replace.items()
            for place, index in replaced
        ]

    def _kernel(self, number: int) -> _Kernel:
        _, program, buffers, fixed = self.calls[number]
        info = program.arg
        assert info.globals == tuple(range(len(buffers))), info
        arguments = [buffer._buf.va_addr for buffer in buffers]
        arguments += [fixed.get(variable.expr, 0) for variable in info.vars]
        core = info.runtimevars.get("core_id")
        return _Kernel(
            self.runtimes[number],
            arguments,
            None if core is None else len(buffers) + core,
            (info.global_size or (1,))[0],
        )

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        """Put the batch into the device's queue; with `wait`, the seconds it took."""
        changes = [(place, input_uops[i].buffer._buf.va_addr) for place, i in self.inputs]
        changes += [(place, var_vals[name]) for place, name in self.values]
        cpu, queue = self.cpu, CPUComputeQueue()
        queue.wait(cpu.timeline_signal, cpu.timeline_value - 1)
        queue.cmd(self.table.prepare, changes).cmd(self.table.run, threads=self.threads)
        if self.timed is not None:
            queue.cmd(self.timed.collect, self.recorder)
        queue.signal(cpu.timeline_signal, cpu.next_timeline()).submit(cpu)
        if not wait:
            return None
        begun = time.perf_counter()
        cpu.synchronize()
        return time.perf_counter() - begun


class Table:
    """What the native code reads. Commands in the queue refer to it, so it lives until they ran.

    It owns no tensor's memory, which tinygrad keeps, so any thread may be the last to release it.
    """

    def __init__(self, kernels: Sequence[_Kernel], native: Any = None) -> None:
        self.programs, self.native = [k.program for k in kernels], native or _native()
        entry = CLAIMS + LINE * max(k.parts for k in kernels)
        end = entry + KERNEL_WORDS * len(kernels)
        self.starts: list[int] = []  # where each kernel's arguments are
        for k in kernels:
            self.starts.append(end)
            end += len(k.arguments)
        self.memory = mmap.mmap(-1, 8 * end)
        self.words = memoryview(self.memory).cast("Q")
        self.address = mv_address(self.memory)
        self.count = self.words[KERNELS] = len(kernels)
        self.words[TABLE] = self.address + 8 * entry
        for start, k in zip(self.starts, kernels, strict=True):
            count = len(k.arguments)
            core = count if k.core is None else k.core
            self._put(entry, [_address(k.program), self.address + 8 * start, count, k.parts, core])
            self._put(start, k.arguments)
            entry += KERNEL_WORDS

    def _put(self, place: int, values: Sequence[int]) -> None:
        for offset, value in enumerate(values):
            self.words[place + offset] = value & _WORD

    def prepare(self, _thread: int, changes: Sequence[tuple[int, int]]) -> None:
        """A command: write `changes` (place, value) and start over. Nothing runs meanwhile."""
        for place, value in changes:
            self.words[place] = value & _WORD
        self.words[FIRST] = self.words[OPEN]

    def run(self, thread: int) -> None:
        """A command of every thread: take part until all kernels are done."""
        self.native(self.address, thread)
        while self.words[OPEN] != self.words[FIRST] + self.count:
            time.sleep(NAP_SECONDS)  # another thread needs longer: leave this core to it
            self.native(self.address, thread)


class TimedTable(Table):
    """A table whose runs are recorded: when each part of each kernel began and ended."""

    def __init__(self, kernels: Sequence[_Kernel], names: Sequence[timing.Kernel]) -> None:
        super().__init__(kernels, _native("TIMED"))
        self.names, self.parts = names, [k.parts for k in kernels]
        self.most = self.words[MOST] = max(self.parts)
        self.stamps = mmap.mmap(-1, 8 * 3 * self.most * self.count)
        self.words[STAMPS] = mv_address(self.stamps)

    def collect(self, _thread: int, recorder: timing.Recorder) -> None:
        """A command: hand over the stamps of the run that has ended."""
        recorder.add(functools.partial(self._decoded, bytes(self.stamps), Clock.now()))

    def _decoded(
        self, stamps: bytes, clock: "Clock", which: timing.Which | None
    ) -> list[timing.Run]:
        words, runs = memoryview(stamps).cast("Q"), []
        seconds = clock.seconds
        for number, (kernel, count) in enumerate(zip(self.names, self.parts, strict=True)):
            if which is not None and not which(kernel):
                continue
            first = 3 * self.most * number
            parts = tuple(
                timing.Part(int(words[at + 2]), seconds(words[at]), seconds(words[at + 1]))
                for at in range(first, first + 3 * count, 3)
            )
            begin, end = min(p.begin for p in parts), max(p.end for p in parts)
            runs.append(timing.Run(kernel, begin, end, parts))
        return runs


@dataclass(frozen=True)
class Clock:
    """The processor's counter and `time.perf_counter` at one moment."""

    count: int
    at: float

    @classmethod
    def now(cls) -> "Clock":
        """Both now."""
        count = _native("COUNTER", ctypes.c_uint64)
        before = time.perf_counter()
        found = int(count())
        return cls(found, (before + time.perf_counter()) / 2)

    def seconds(self, count: int) -> float:
        """`time.perf_counter` when the counter stood at `count`."""
        return self.at + (count - self.count) * _seconds_per_count()


@functools.cache
def _seconds_per_count() -> float:
    """Measured once, over a fiftieth of a second."""
    first = Clock.now()
    time.sleep(0.02)
    last = Clock.now()
    return (last.at - first.at) / (last.count - first.count)


@functools.cache
def _native(form: str = "", result: Any = None) -> Any:
    """A form of launch.c; the program's memory lives as long as the process."""
    cpu = cpu_device()
    text = (resources.files("tinyllama.runtime") / "launch.c").read_text()
    name = f"launch{form}"
    code = f"#define KERNEL {name}\n" + (f"#define {form}\n" if form else "") + text
    program = cpu.runtime(name, cpu.compiler.compile_cached(code))
    arguments = () if form == "COUNTER" else (ctypes.c_void_p, ctypes.c_int)
    function: Any = ctypes.CFUNCTYPE(result, *arguments)(_address(program))
    function.program = program
    return function


def _address(program: Any) -> int:
    """Where a compiled kernel begins."""
    return int(ctypes.cast(program.fxn, ctypes.c_void_p).value or 0)
