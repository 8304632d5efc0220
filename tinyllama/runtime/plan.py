"""The memory that a captured step would need, known by capturing it without running it.

The tensors that exist only within a captured step share memory (layout.py). The same layout is
computed here for the same kernels, so the size is exact. Nothing is compiled, allocated or
computed, and the tensors that the step works on need no memory.
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
    used_buffers,
)


@dataclass(frozen=True)
class Plan:
    """Bytes of a step's own tensors.

    arena is what is allocated. The other three are the largest use at one moment of gradients, of
    tensors that one piece of the step keeps for another (activations), and of work space within a
    piece. Memory is reused, so their sum may exceed the arena.
    """

    arena: int
    gradients: int
    kept: int
    work: int


class _Recorder:
    """Receives the pieces of a step in the place of tinygrad's own capture."""

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

    `gradients` is called afterwards and returns those of the tensors that are gradients.
    """
    # Buffers are numbered in the order they are made: the step's own come after this number.
    before = UOp.unique().arg
    pieces, result = recorded(function, inputs)
    kernels = UOp(Ops.LINEAR, src=tuple(call for piece in pieces for call in piece.src))
    held = {result.uop.base} if isinstance(result, Tensor) else set()
    every = {buffer for call in kernels.src for buffer in used_buffers(call.src[1:])}
    held |= {b for b in every if b.src[0].arg < before or b in buffers}
    gradient_buffers = {tensor.uop.base for tensor in gradients()}
    return Plan(laid_out_bytes(kernels, held), *_purposes(pieces, held, gradient_buffers))


def recorded(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[UOp], Any]:
    """The pieces (LINEARs of kernels' calls) of the step `function(*inputs)`, and its result."""
    recorder = _Recorder()
    capturing.append(recorder)
    try:
        result = function(*inputs)
    finally:
        capturing.clear()
    return recorder.pieces, result


def _purposes(
    pieces: list[UOp], held: set[UOp], gradient_buffers: set[UOp]
) -> tuple[int, int, int]:
    """Largest bytes at one moment of gradients, of what is kept between pieces, of the rest."""
    uses: dict[UOp, list[tuple[int, int]]] = {}  # (piece, kernel) numbers of every use
    clock = itertools.count()
    for number, piece in enumerate(pieces):
        for call in piece.src:
            moment = next(clock)
            for buffer in {*used_buffers(call.src[1:])} - held:
                uses.setdefault(buffer, []).append((number, moment))
    gradients: list[Life] = []
    kept: list[Life] = []
    work: list[Life] = []
    for buffer, places in uses.items():
        (first_piece, begin), (last_piece, end) = places[0], places[-1]
        group = (
            gradients if buffer in gradient_buffers else work if first_piece == last_piece else kept
        )
        group.append(Life(begin, end, nbytes(buffer)))
    return _highest(gradients), _highest(kept), _highest(work)


def _highest(lives: list[Life]) -> int:
    """Largest sum of bytes at one moment."""
    changes = [(begin, size) for begin, _, size in lives]
    changes += [(end + 1, -size) for _, end, size in lives]
    highest = now = 0
    for _, change in sorted(changes):  # at the same moment, an end sorts before a beginning
        now += change
        highest = max(highest, now)
    return highest
