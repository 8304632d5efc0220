"""Two changes to how tinygrad 0.13 handles memory.

Large CPU buffers in huge pages: fewer page faults at the start, fewer TLB misses ever after.
tinygrad maps its CPU buffers as shared memory, for which Linux gives 4 KiB pages: touching the
2.6 GB of a 124M model's training state for the first time costs seconds. Private memory with
MADV_HUGEPAGE costs a tenth of it, and buffers side by side leave no small pages at their ends.
Elsewhere than on Linux nothing changes.

A captured step that is garbage waits for the device before its memory goes. Python may collect
garbage on any thread, so also on the one that runs kernels, which then waits for itself for ever.
"""

import functools
import mmap
import os
import threading
from typing import Any

from tinygrad.device import Buffer, BufferSpec, Device
from tinygrad.helpers import mv_address
from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.runtime.ops_cpu import CPUWorker
from tinygrad.runtime.support.hcq import HCQBuffer, MMIOInterface

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
        try:
            if options.external_ptr is not None or size < HUGE_PAGE_BYTES:
                return allocate(size, options)
            piece = regions.take(size)
        except OSError as error:  # of which tinygrad expects a MemoryError
            raise MemoryError(f"the system has no {size:,} bytes: {error.strerror}") from error
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
def free_steps_elsewhere() -> None:
    """From here on, a step that is collected on a thread that runs kernels is freed on another."""
    free = HCQGraph.__del__

    def free_elsewhere(step: Any) -> None:
        if isinstance(threading.current_thread(), CPUWorker):
            threading.Thread(target=free, args=(step,), name="free").start()
        else:
            free(step)

    HCQGraph.__del__ = free_elsewhere
