"""The layout of memory for tensors that exist only within a step, so that they share it.

Tensors are placed from the largest to the smallest, each into the smallest hole between those that
are alive at the same time (greedy by size: Pisarchyk and Lee, "Efficient Memory Management for Deep
Neural Net Inference", 2020, arXiv:2001.03288). patches/layout.py says why tinygrad's own planner
does not do.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tinygrad import dtypes
from tinygrad.device import Buffer, Device
from tinygrad.helpers import NO_MEMORY_PLANNER
from tinygrad.uop.ops import Ops, UOp, buffers

BLOCK_BYTES = 256  # an alignment that suits every device and vector instruction


class Life(NamedTuple):
    """The numbers of the first and the last kernel that use a tensor, and its size."""

    first: int
    last: int
    nbytes: int


def lay_out(kernels: UOp, held: set[UOp] | None = None) -> UOp:
    """The kernels with their tensors in shared memory; `held` tensors stay where they are."""
    if NO_MEMORY_PLANNER:
        return kernels
    places: dict[UOp, UOp] = {}
    for device, lives in _lanes(kernels, held or set()):
        if not _has_slices(device):
            _share(device, lives)
            continue
        offsets, size = placed([*lives.values()])
        arena = UOp.new_buffer(device, size, dtypes.int8)
        for buffer, offset in zip(lives, offsets, strict=True):
            where = (buffer.arg, offset // buffer.dtype.itemsize)
            places[buffer] = UOp(Ops.BUFFER_VIEW, buffer.dtype, (arena,), where)
    return kernels.substitute(places, name="memory plan", walk=True)


def laid_out_bytes(kernels: UOp, held: set[UOp]) -> int:
    """Bytes that `lay_out` would allocate for these kernels; allocates nothing."""
    total = 0
    for device, lives in _lanes(kernels, held):
        spans = [*lives.values()]
        if _has_slices(device):
            total += placed(spans)[1]
        else:
            total += sum(spans[largest].nbytes for largest, *_ in shared(spans))
    return total


def placed(lives: Sequence[Life]) -> tuple[list[int], int]:
    """An offset for each tensor, such that no two overlap while both live, and the total bytes."""
    order = _largest_first(lives)
    first, last = (np.array([lives[i][n] for i in order]) for n in (0, 1))
    sizes = np.array([-(-lives[i].nbytes // BLOCK_BYTES) * BLOCK_BYTES for i in order], np.int64)
    starts = np.zeros(len(order), np.int64)
    for n in range(len(order)):
        beside = np.flatnonzero((first[:n] <= last[n]) & (last[:n] >= first[n]))
        beside = beside[np.argsort(starts[beside], kind="stable")]
        ends = np.maximum.accumulate(starts[beside] + sizes[beside])
        holes = np.concatenate(([0], ends))
        room = np.append(starts[beside], np.iinfo(np.int64).max) - holes
        enough = np.flatnonzero(room >= sizes[n])
        starts[n] = holes[enough[np.argmin(room[enough])]]
    offsets = dict(zip(order, starts.tolist(), strict=True))
    return [offsets[i] for i in range(len(lives))], int((starts + sizes).max(initial=0))


def shared(lives: Sequence[Life]) -> list[list[int]]:
    """Groups of tensors of which no two live at once, so that each group needs one buffer.

    The first of a group is its largest.
    """
    groups: list[list[int]] = []
    busy = np.zeros((len(lives), max((life.last for life in lives), default=0) + 1), bool)
    for i in _largest_first(lives):
        span = slice(lives[i].first, lives[i].last + 1)
        free = np.flatnonzero(~busy[: len(groups), span].any(1))
        if len(free):
            group = int(free[0])
            groups[group].append(i)
        else:
            group = len(groups)
            groups.append([i])
        busy[group, span] = True
    return groups


def _largest_first(lives: Sequence[Life]) -> list[int]:
    return sorted(range(len(lives)), key=lambda i: (-lives[i].nbytes, lives[i].first))


def used_buffers(uops: Iterable[UOp], *, slices: bool = True) -> Iterator[UOp]:
    """The buffers among a kernel's arguments, also on several devices.

    With `slices`, also the buffers of which it uses only a slice.
    """
    for uop in map(_whole, uops) if slices else uops:
        if uop.op is Ops.BUFFER:
            yield uop
        elif uop.op in (Ops.MSELECT, Ops.MSTACK):
            yield from used_buffers(uop.src, slices=slices)


def _whole(uop: UOp) -> UOp:
    """The buffer behind a slice, or behind a slice of a slice."""
    return _whole(uop.src[0]) if uop.op is Ops.BUFFER_VIEW else uop


def nbytes(buffer: UOp) -> int:
    """A buffer's size in bytes, whether it is allocated or not."""
    return int(buffer.arg * buffer.dtype.itemsize)


def _lanes(kernels: UOp, held: set[UOp]) -> Iterator[tuple[Any, dict[UOp, Life]]]:
    """Devices, and the lives of the tensors to be placed on each.

    Tensors that are copied share no memory with those that are computed, and count as living twice
    as long, so that a copy does not have to wait for a kernel.
    """
    first: dict[UOp, int] = {}
    last: dict[UOp, int] = {}
    written: set[UOp] = set()
    copied: set[UOp] = set()
    for moment, call in enumerate(kernels.src):
        # A buffer of which this kernel uses a slice was written by another one.
        written.update(used_buffers(call.src[1:], slices=False))
        used = [*used_buffers(call.src[1:])]
        first |= {buffer: moment for buffer in used if buffer not in first}
        last |= dict.fromkeys(used, moment)
        if call.src[0].op is Ops.COPY:
            copied.update(used)
    lanes: dict[tuple[Any, bool], dict[UOp, Life]] = {}
    for buffer, begin in first.items():
        if buffer in written and buffer not in held and _is_shareable(buffer.device):
            copies, end = buffer in copied, last[buffer]
            end += copies * (end - begin + 1)
            lanes.setdefault((buffer.device, copies), {})[buffer] = Life(begin, end, nbytes(buffer))
    for (device, _), lives in lanes.items():
        yield device, lives


def _devices(device: Any) -> tuple[str, ...]:
    return (device,) if isinstance(device, str) else tuple(device)


def _is_shareable(device: Any) -> bool:
    """Not a file's, and not spread over several devices of which one has no slices."""
    if any(name.startswith(("DISK", "TINYFS")) for name in _devices(device)):
        return False
    return isinstance(device, str) or _has_slices(device)


def _has_slices(device: Any) -> bool:
    return all(hasattr(Device[name].allocator, "_offset") for name in _devices(device))


def _share(device: str, lives: dict[UOp, Life]) -> None:
    """Give one buffer to each group of tensors that never live at once."""
    tensors = [*lives]
    for group in shared([*lives.values()]):
        base = Buffer(device, nbytes(tensors[group[0]]), dtypes.int8)
        for i in group:
            buffers[tensors[i]] = _Beginning(base, tensors[i]).ref(1)


class _Beginning(Buffer):  # type: ignore[misc]
    """The first bytes of another buffer, on a device that has no slices."""

    def __init__(self, whole: Buffer, tensor: UOp) -> None:
        super().__init__(whole.device, tensor.arg, tensor.dtype, base=whole)

    def allocate(self, opaque: Any = None, external_ptr: Any = None) -> Buffer:
        """Use the other buffer's memory, which is allocated if it is not yet."""
        self.allocator = Device[self.device].allocator
        self.base.ensure_allocated().allocated_views += 1
        self._bufs[self.device] = self.base._buf
        return self
