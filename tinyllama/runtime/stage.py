"""Pieces of a computation that are scheduled once and run for many sets of tensors.

tinygrad schedules in Python: a graph of twelve equal layers takes twelve times as long as that of
one, which is seconds before the first loss. A Stage schedules its piece for the first tensors it
is given; for others of the same shapes it only replaces the buffers. Inside a captured step
(TinyJit) the pieces become one graph with one layout of memory.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakSet

from tinygrad import Tensor
from tinygrad.engine.realize import capturing, run_linear
from tinygrad.helpers import Context
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import precompile, sources
from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.kernel import buffers_of
from tinyllama.runtime.patches import install

Build = Callable[[], Sequence[Tensor]]

_recomputed: WeakSet[UOp] = WeakSet()


class _Template:
    """A scheduled piece: its kernels, with the buffers of the tensors it was built from."""

    def __init__(self, tensors: Sequence[Tensor], build: Build) -> None:
        self.inputs = _buffers(tensors)
        outputs = list(build())
        pending = [t for t in outputs if not t.uop.has_buffer_identity()]
        piece = sources.Piece(pending) if sources.tracking() else None
        # Memory is laid out by the step that the pieces become part of.
        with Context(CAPTURING=0, NO_MEMORY_PLANNER=1):
            self.kernels, variables = Tensor.linear_with_vars(*pending)
        if piece is not None:
            self.kernels = piece.attributed(self.kernels, pending)
        assert not variables
        self.outputs = [(_buffer(t), t.shape) for t in outputs]
        used = {u for u in self.kernels.toposort() if u.op is Ops.BUFFER}
        self.is_compiling = False
        self.internal = used - set(self.inputs)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the piece on these tensors; outputs are new tensors, or inputs that it updates."""
        places = dict(zip(self.inputs, _buffers(tensors), strict=True))
        places |= {b: UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.internal}
        if precompile.is_capturing() and not self.is_compiling:
            self.kernels, self.is_compiling = precompile.start(self.kernels), True
        kernels = self.kernels.substitute(places, walk=True)
        if capturing:
            capturing[0].add_linear(kernels, {})
        else:
            finish_background_writes()
            run_linear(kernels)
        return [Tensor(places[b].reshape(shape)) for b, shape in self.outputs]


class Stage:
    """One kind of piece: called with the tensors it reads and a function that builds it, within
    the context that `around` returns."""

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        install()
        self._around = around
        self._templates: dict[Hashable, _Template] = {}

    def __call__(
        self, tensors: Sequence[Tensor], build: Build, key: Hashable = None
    ) -> list[Tensor]:
        """Run on `tensors`: whole realized buffers, all different.

        `build` returns the outputs, computed from `tensors` and nothing else; it is called once
        for each combination of shapes, types and `key`. Outputs are realized, in a captured step
        when it runs; an output may be an input that a kernel updates in place.
        """
        signature = (key, tuple((t.shape, t.dtype, t.device) for t in tensors))
        template = self._templates.get(signature)
        if template is None:
            with self._around():
                template = self._templates[signature] = _Template(tensors, build)
        return template.run(tensors)


def recomputed(tensor: Tensor) -> Tensor:
    """`tensor`, marked as not saved for the backward pass, which computes it again.

    For large tensors that are cheap to compute.
    """
    _recomputed.add(tensor.uop)
    return tensor


def saved_for_backward(
    out: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Tensors that computing `out` from `inputs` writes to memory, without `out` itself.

    Left out are also those marked by `recomputed`, and what is computed from `weights` alone (a
    packed one that was widened); but not a float32 weight that was narrowed for a GPU's kernel.
    """
    known = {t.uop for t in (*inputs, *weights)}
    varying = {t.uop for t in inputs}
    saved: dict[UOp, None] = {}
    for uop in out.uop.toposort(gate=lambda u: u not in known):
        if varying.isdisjoint(uop.src):
            if is_narrowed(uop, known) and out.device != "CPU":
                saved[uop] = None
            continue
        varying.add(uop)
        if uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL:
            call = uop.src[1]  # everything the kernel wrote, also what only a gradient reads
            saved |= {output.after(call): None for output in buffers_of(call)[0]}
        elif uop.op is Ops.CONTIGUOUS and uop not in _recomputed and not _has_memory(uop.src[0]):
            saved[uop] = None
    return [Tensor(uop) for uop in saved if uop is not out.uop and uop not in known]


def replaced(
    tensors: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]
) -> list[Tensor]:
    """`tensors`, computed from `new` wherever they were computed from `old`."""
    places = {a.uop: b.uop for a, b in zip(old, new, strict=True)}
    before = UOp.sink(*(t.uop for t in tensors))
    sink = before.substitute(places, walk=True)
    if sources.tracking():
        sources.carried(before.src, sink.src)
    return [Tensor(uop) for uop in sink.src]


def _has_memory(uop: UOp) -> bool:
    """Whether this is in memory, or a buffer that a kernel is about to write: no CONTIGUOUS writes
    it once more."""
    while uop.op in (Ops.RESHAPE, Ops.CONTIGUOUS_BACKWARD):
        uop = uop.src[0]
    return uop.op in (Ops.AFTER, Ops.CONTIGUOUS) or uop.base.op is Ops.CONST


def is_narrowed(uop: UOp, weights: set[UOp]) -> bool:
    """Whether this is a weight written to memory in a smaller type."""
    if uop.op is not Ops.CONTIGUOUS or uop.src[0].op is not Ops.CAST:
        return False
    weight = uop.src[0].src[0]
    return weight in weights and uop.dtype.itemsize < weight.dtype.itemsize


def _buffer(tensor: Tensor) -> UOp:
    base: UOp = tensor.uop.base
    assert base.op is Ops.BUFFER, f"a stage works on whole buffers, not on {base.op}"
    return base


def _buffers(tensors: Sequence[Tensor]) -> list[UOp]:
    """The tensors' buffers, all different: what is updated in place must be no other input."""
    buffers = [_buffer(t) for t in tensors]
    assert len(set(buffers)) == len(buffers), "a stage got the same tensor twice"
    return buffers
