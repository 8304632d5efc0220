"""What a captured step would hold in memory, found by capturing it without running it.

The tensors that live and die within a captured step share memory (layout.py). The same layout is
made here for the same kernels, so the size is exact; nothing is compiled, allocated or computed,
and the tensors that the step works on need no memory.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor
from tinygrad.engine.realize import capturing
from tinygrad.uop.ops import Ops, UOp, buffers

from tinyllama.runtime.layout import (
    Life,
    laid_out_bytes,
    nbytes,
    taken,
)


@dataclass(frozen=True)
class Plan:
    """Bytes of a step's own tensors.

    arena is what is allocated. The others say what for, each at its highest: gradients, other
    tensors kept from one piece of the step for another (activations), and work space within a
    piece. Memory is used again, so together they may be more than the arena.
    """

    arena: int
    gradients: int
    kept: int
    work: int


class _Recorder:
    """Takes the pieces of a step as tinygrad's own capture does."""

    def __init__(self) -> None:
        self.pieces: list[UOp] = []

    def add_linear(self, linear: UOp, _variables: dict[str, int]) -> None:
        self.pieces.append(linear)


def plan(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    gradients: Callable[[], Sequence[Tensor]] = list,
) -> Plan:
    """Capture `function(*inputs)`, which returns a tensor or nothing, and plan its memory.

    `gradients` is asked afterwards which of the tensors that were made are gradients.
    """
    # Buffers get rising numbers: those that come later, and get no memory, are the step's own.
    before = UOp.unique().arg
    recorder = _Recorder()
    capturing.append(recorder)
    try:
        result = function(*inputs)
    finally:
        capturing.clear()
    kernels = UOp(Ops.LINEAR, src=tuple(call for piece in recorder.pieces for call in piece.src))
    held = {result.uop.base} if isinstance(result, Tensor) else set()
    every = {buffer for call in kernels.src for buffer in taken(call.src[1:])}
    held |= {b for b in every if b.src[0].arg < before or b in buffers}
    found = {tensor.uop.base for tensor in gradients()}
    return Plan(laid_out_bytes(kernels, held), *_purposes(recorder.pieces, held, found))


def _purposes(pieces: list[UOp], held: set[UOp], found: set[UOp]) -> tuple[int, int, int]:
    """Highest bytes at once of gradients, of what is kept between pieces, and of the rest."""
    uses: dict[UOp, list[tuple[int, int]]] = {}  # (piece, kernel) of every use
    clock = itertools.count()
    for number, piece in enumerate(pieces):
        for call in piece.src:
            moment = next(clock)
            for buffer in {*taken(call.src[1:])} - held:
                uses.setdefault(buffer, []).append((number, moment))
    gradients: list[Life] = []
    kept: list[Life] = []
    work: list[Life] = []
    for buffer, places in uses.items():
        (first_piece, begin), (last_piece, end) = places[0], places[-1]
        group = gradients if buffer in found else work if first_piece == last_piece else kept
        group.append(Life(begin, end, nbytes(buffer)))
    return _highest(gradients), _highest(kept), _highest(work)


def _highest(lives: list[Life]) -> int:
    """Largest sum of bytes alive at once."""
    changes = [(begin, size) for begin, _, size in lives]
    changes += [(end + 1, -size) for _, end, size in lives]
    highest = now = 0
    for _, change in sorted(changes):  # at one moment, what ends comes before what begins
        now += change
        highest = max(highest, now)
    return highest
