"""Large CPU buffers in huge pages: fewer page faults at the start, fewer TLB misses ever after.

tinygrad maps its CPU buffers as shared memory, for which Linux gives 4 KiB pages: touching the
2.6 GB of a 124M model's training state for the first time takes seconds. Private memory with
MADV_HUGEPAGE takes a tenth of that, and buffers side by side leave no small pages at their ends.
On other systems than Linux nothing changes.
"""

import math
import mmap
import threading

from tinygrad.device import BufferSpec
from tinygrad.helpers import mv_address
from tinygrad.runtime.ops_cpu import CPUAllocator
from tinygrad.runtime.support.hcq import HCQBuffer, MMIOInterface

from tinyllama.runtime.patches.patch import Patch

HUGE_PAGE_BYTES = 2 << 20
# Addresses reserved at a time; the system gives memory only where they are written to.
REGION_BYTES = 4 << 30


class _Regions:
    """Addresses in huge pages, each handed out once, one piece after another.

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


def apply() -> None:
    """From here on, CPU buffers of at least a huge page lie in huge pages where Linux has them."""
    allocate, regions = CPUAllocator._alloc, _Regions()
    least = HUGE_PAGE_BYTES if hasattr(mmap, "MADV_HUGEPAGE") else math.inf

    def allocate_huge(allocator: CPUAllocator, size: int, options: BufferSpec) -> HCQBuffer:
        try:
            if options.external_ptr is not None or size < least:
                return allocate(allocator, size, options)
            piece = regions.take(size)
        except OSError as error:  # of which tinygrad expects a MemoryError
            raise MemoryError(f"the system has no {size:,} bytes: {error.strerror}") from error
        view = MMIOInterface(piece.address, size, fmt="B")
        return HCQBuffer(piece.address, size, meta=piece, view=view, owner=allocator.dev)

    CPUAllocator._alloc = allocate_huge


PATCH = Patch(
    name="huge_pages",
    replaces=("tinygrad.runtime.ops_cpu.CPUAllocator._alloc",),
    why="puts large CPU buffers into huge pages, which take a tenth of the time to touch first",
    test="tests/runtime/test_storage.py::test_tensors_side_by_side_lie_in_few_pages",
    apply=apply,
)
