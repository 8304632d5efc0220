"""What a captured step would hold in memory, found by capturing it without running it.

tinygrad lays the tensors that live and die within a captured step into one arena. The same
planner is asked here for the same kernels, so the arena's size is exact; nothing is compiled,
allocated or computed, and the tensors that the step works on need no memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor
from tinygrad.engine.realize import capturing
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, UOp


@dataclass(frozen=True)
class Plan:
    """Bytes of a step's own tensors.

    arena_bytes is what is allocated. The others say what for, each at its highest: carried to the
    last piece of the step (gradients, which the update reads), kept from one piece for another
    (activations), and work space within a piece. Memory is used again, so they may add up to more.
    """

    arena_bytes: int
    carried_bytes: int
    kept_bytes: int
    work_bytes: int


class _Recorder:
    """Takes the pieces of a step as tinygrad's own capture does."""

    def __init__(self) -> None:
        self.pieces: list[UOp] = []

    def add_linear(self, linear: UOp, _variables: dict[str, int]) -> None:
        self.pieces.append(linear)


def plan(function: Callable[..., Any], *inputs: Tensor) -> Plan:
    """Capture `function(*inputs)`, which returns a tensor or nothing, and plan its memory."""
    before = UOp.unique().arg  # buffers get rising numbers: those that come later are the step's
    recorder = _Recorder()
    capturing.append(recorder)
    try:
        result = function(*inputs)
    finally:
        capturing.clear()
    kernels = UOp(Ops.LINEAR, src=tuple(call for piece in recorder.pieces for call in piece.src))
    held = {result.uop.base} if isinstance(result, Tensor) else set()
    held |= {buffer for buffer in _buffers(kernels.src) if buffer.src[0].arg < before}
    return Plan(_arena_bytes(memory_plan_rewrite(kernels, held)), *_purposes(recorder.pieces, held))


def _arena_bytes(planned: UOp) -> int:
    """Bytes of the memory that the planner laid tensors into."""
    views = (u for call in planned.src for u in call.src[1:] if u.op is Ops.BUFFER_VIEW)
    return sum(arena.arg for arena in {view.src[0] for view in views})


def _purposes(pieces: list[UOp], held: set[UOp]) -> tuple[int, int, int]:
    """Highest bytes of the tensors carried to the last piece, kept between pieces, and within."""
    lives: dict[UOp, list[tuple[int, int]]] = {}  # (piece, kernel) of every use
    clock = 0
    for number, piece in enumerate(pieces):
        for call in piece.src:
            for buffer in _buffers([call]) - held:
                lives.setdefault(buffer, []).append((number, clock))
            clock += 1
    last = len(pieces) - 1
    carried: list[tuple[int, int, int]] = []
    kept: list[tuple[int, int, int]] = []
    work: list[tuple[int, int, int]] = []
    for buffer, uses in lives.items():
        if buffer.arg == 1:
            continue  # a loss or a norm
        (first_piece, begin), (last_piece, end) = uses[0], uses[-1]
        group = work if first_piece == last_piece else carried if last_piece == last else kept
        group.append((begin, end, buffer.arg * buffer.dtype.itemsize))
    return _highest(carried), _highest(kept), _highest(work)


def _highest(lives: list[tuple[int, int, int]]) -> int:
    """Largest sum of bytes alive at once, of lives (first kernel, last kernel, bytes)."""
    changes = [(begin, size) for begin, _, size in lives]
    changes += [(end + 1, -size) for _, end, size in lives]
    highest = now = 0
    for _, change in sorted(changes):  # at one moment, what ends comes before what begins
        now += change
        highest = max(highest, now)
    return highest


def _buffers(calls: Iterable[UOp]) -> set[UOp]:
    """The buffers that kernels read and write."""
    return {u for call in calls for u in call.src[1:] if u.op is Ops.BUFFER}
