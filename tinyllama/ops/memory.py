"""Three changes to how tinygrad 0.13 handles memory.

Large CPU buffers in huge pages: fewer page faults at the start, fewer TLB misses ever after.
tinygrad maps its CPU buffers as shared memory, for which Linux gives 4 KiB pages: touching the
2.6 GB of a 124M model's training state for the first time costs seconds. Private memory with
MADV_HUGEPAGE costs a tenth of it, and buffers side by side leave no small pages at their ends.
Elsewhere than on Linux nothing changes.

Tensors that are read in slices live until the last slice is read: tinygrad's planner sees only
kernels that read a tensor whole, and gives its memory to others too early.

A captured step that is garbage waits for the device before its memory goes. Python may collect
garbage on any thread, so also on the one that runs kernels, which then waits for itself for ever.
"""

import contextlib
import functools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tinygrad import schedule
from tinygrad.device import Buffer, BufferSpec, Device
from tinygrad.engine import jit
from tinygrad.helpers import mv_address
from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.runtime.ops_cpu import CPUWorker
from tinygrad.runtime.support.hcq import HCQBuffer, MMIOInterface
from tinygrad.schedule import memory as planner
from tinygrad.uop.ops import Ops, UOp

HUGE_PAGE_BYTES = 2 << 20
# Addresses asked for at a time: the system gives memory where they are written to.
REGION_BYTES = 4 << 30


@functools.cache
def use_huge_pages() -> None:
    """From here on, CPU buffers of a huge page and more lie in huge pages where Linux has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    allocator: Any = Device["CPU"].allocator
    allocate, regions = allocator._alloc, _Regions()

    def allocate_huge(size: int, options: BufferSpec) -> HCQBuffer:
        if options.external_ptr is not None or size < HUGE_PAGE_BYTES:
            return allocate(size, options)
        piece = regions.take(size)
        view = MMIOInterface(piece.address, size, fmt="B")
        return HCQBuffer(piece.address, size, meta=piece, view=view, owner=allocator.dev)

    allocator._alloc = allocate_huge


class _Regions:
    """Addresses in huge pages, handed out one after another and never again.

    Buffers that lie side by side fill their huge pages whole, whatever their sizes.
    """

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None
        self.next = self.end = 0
        self.lock = threading.Lock()

    def take(self, size: int) -> "_Piece":
        """New memory of `size` bytes, zero."""
        with self.lock:
            if self.memory is None or self.next + size > self.end:
                self._begin(size)
            assert self.memory is not None
            start = self.next
            self.next += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            return _Piece(self.memory, start, self.next - start)

    def _begin(self, size: int) -> None:
        """A new region; the last one lives as long as its pieces."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANON
        length = size + HUGE_PAGE_BYTES  # which lets the first piece begin at a huge page's address
        try:
            self.memory = mmap.mmap(-1, max(length, REGION_BYTES), flags)
        except OSError:  # a small machine, or one with a limit: take what is needed
            self.memory = mmap.mmap(-1, length, flags)
        self.end = len(self.memory)
        self.next = -mv_address(self.memory) % HUGE_PAGE_BYTES
        self.memory.madvise(mmap.MADV_HUGEPAGE, self.next, self.end - self.next)


class _Piece:
    """A buffer's part of a region; what it held is given back with it."""

    def __init__(self, memory: mmap.mmap, start: int, length: int) -> None:
        self.memory, self.start, self.length = memory, start, length
        self.address = mv_address(memory) + start

    def __del__(self) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED, self.start, self.length)


def allocate_zeros(buffer: Buffer) -> bool:
    """Give a CPU buffer that has no memory yet new memory, which is zero and untouched.

    False, with nothing done, where the buffer has memory or the system may not clear it.
    """
    if buffer.is_initialized() or os.name != "posix":
        return False
    # Not allocator.alloc, which hands out again what was freed.
    allocator: Any = Device["CPU"].allocator
    buffer.allocate(allocator._alloc(buffer.nbytes, BufferSpec()))
    return True


@functools.cache
def keep_what_slices_read() -> None:
    """From here on, the planner takes a kernel that reads a slice of a tensor for its reader."""
    for module in (planner, schedule, jit):
        module.memory_plan_rewrite = plan_memory


def plan_memory(kernels: UOp, held: set[UOp] | None = None) -> UOp:
    """tinygrad's `memory_plan_rewrite`, which sees slices: `held` keep the memory they have."""
    sources = [u for call in kernels.src for u in call.src[1:]]
    # Of what no kernel here takes whole, no kernel here wrote what the slices hold.
    from_elsewhere = set(_buffers(sources, slices=True)) - set(_buffers(sources, slices=False))
    with _seeing_slices():
        return _plan_memory(kernels, (held or set()) | from_elsewhere)


_plan_memory = planner.memory_plan_rewrite
_collect_buffers = planner._collect_bufs


def _buffers(sources: Iterable[UOp], *, slices: bool) -> list[UOp]:
    taken = (whole(u) if slices else u for u in sources)
    return [buffer for uop in taken for buffer in _collect_buffers(uop)]


def whole(uop: UOp) -> UOp:
    """What a slice, or a slice of a slice, is of."""
    return whole(uop.src[0]) if uop.op is Ops.BUFFER_VIEW else uop


@contextlib.contextmanager
def _seeing_slices() -> Iterator[None]:
    planner._collect_bufs = lambda uop: _collect_buffers(whole(uop))
    try:
        yield
    finally:
        planner._collect_bufs = _collect_buffers


@functools.cache
def free_steps_elsewhere() -> None:
    """From here on, a step that is collected on a thread that runs kernels is freed on another."""
    free = HCQGraph.__del__

    def free_elsewhere(step: Any) -> None:
        if isinstance(threading.current_thread(), CPUWorker):
            threading.Thread(target=free, args=(step,), name="free").start()
        else:
            free(step)

    HCQGraph.__del__ = free_elsewhere
