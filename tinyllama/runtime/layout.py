"""Where the tensors that live and die within a step lie: in memory that they share.

It takes the place of tinygrad 0.13's planner, which lays tensors out in the order of their making
and so leaves holes, does not see kernels that read a slice of a tensor, and gives each tensor
memory of its own where a device has no slices (OpenCL): four times what is alive at once.

Largest first, each into the smallest hole among those alive with it (Pisarchyk and Lee, "Efficient
Memory Management for Deep Neural Net Inference", 2020, arXiv:2001.03288, greedy by size).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tinygrad import dtypes
from tinygrad.device import Buffer, Device
from tinygrad.helpers import NO_MEMORY_PLANNER
from tinygrad.uop.ops import Ops, UOp, buffers

BLOCK_BYTES = 256  # what any device and vector instruction asks of an address


class Life(NamedTuple):
    """The first and the last kernel that take a tensor, and its size."""

    first: int
    last: int
    nbytes: int


def lay_out(kernels: UOp, held: set[UOp] | None = None) -> UOp:
    """The kernels over memory that their tensors share; `held` keep the memory they have."""
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
    """Bytes of the memory that `lay_out` would share out; takes none."""
    total = 0
    for device, lives in _lanes(kernels, held):
        spans = [*lives.values()]
        if _has_slices(device):
            total += placed(spans)[1]
        else:
            total += sum(spans[largest].nbytes for largest, *_ in shared(spans))
    return total


def placed(lives: Sequence[Life]) -> tuple[list[int], int]:
    """An offset for each, no two of which overlap while both live, and the bytes of it all."""
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
    """Groups of which no two ever live together, so that one memory serves each; largest first."""
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


def taken(uops: Iterable[UOp], *, slices: bool = True) -> Iterator[UOp]:
    """The buffers that a kernel takes, of one device or several; those that it takes only slices
    of too, unless not `slices`."""
    for uop in map(_whole, uops) if slices else uops:
        if uop.op is Ops.BUFFER:
            yield uop
        elif uop.op in (Ops.MSELECT, Ops.MSTACK):
            yield from taken(uop.src, slices=slices)


def _whole(uop: UOp) -> UOp:
    """What a slice, or a slice of a slice, is of."""
    return _whole(uop.src[0]) if uop.op is Ops.BUFFER_VIEW else uop


def nbytes(buffer: UOp) -> int:
    """Its size, whether it has memory or not."""
    return int(buffer.arg * buffer.dtype.itemsize)


def _lanes(kernels: UOp, held: set[UOp]) -> Iterator[tuple[Any, dict[UOp, Life]]]:
    """Devices, and the lives of the tensors to be laid out on each.

    Tensors that are copied lie apart from those that are computed and live twice as long, so that
    a copy waits for no kernel.
    """
    first: dict[UOp, int] = {}
    last: dict[UOp, int] = {}
    written: set[UOp] = set()
    copied: set[UOp] = set()
    for moment, call in enumerate(kernels.src):
        # What only slices are taken of was written elsewhere.
        written.update(taken(call.src[1:], slices=False))
        found = [*taken(call.src[1:])]
        first |= {buffer: moment for buffer in found if buffer not in first}
        last |= dict.fromkeys(found, moment)
        if call.src[0].op is Ops.COPY:
            copied.update(found)
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
    """No file's, and not spread over several devices of which one knows only whole buffers."""
    if any(name.startswith(("DISK", "TINYFS")) for name in _devices(device)):
        return False
    return isinstance(device, str) or _has_slices(device)


def _has_slices(device: Any) -> bool:
    return all(hasattr(Device[name].allocator, "_offset") for name in _devices(device))


def _share(device: str, lives: dict[UOp, Life]) -> None:
    """Give tensors that never live together one buffer."""
    tensors = [*lives]
    for group in shared([*lives.values()]):
        base = Buffer(device, nbytes(tensors[group[0]]), dtypes.int8)
        for i in group:
            buffers[tensors[i]] = _Beginning(base, tensors[i]).ref(1)


class _Beginning(Buffer):  # type: ignore[misc]
    """The beginning of another buffer, on a device that knows only whole ones."""

    def __init__(self, whole: Buffer, tensor: UOp) -> None:
        super().__init__(whole.device, tensor.arg, tensor.dtype, base=whole)

    def allocate(self, opaque: Any = None, external_ptr: Any = None) -> Buffer:
        """Take the other's memory, which it gets if it has none."""
        self.allocator = Device[self.device].allocator
        self.base.ensure_allocated().allocated_views += 1
        self._bufs[self.device] = self.base._buf
        return self
