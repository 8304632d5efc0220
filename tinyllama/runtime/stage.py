"""Pieces of a computation that are scheduled once and run for many sets of tensors.

tinygrad schedules in Python: a graph of twelve equal layers costs twelve times the graph of one,
seconds before the first loss. A Stage schedules its piece for the first tensors it is given and,
for others of the same shapes, only puts their buffers in place of the first ones. Inside a
captured step (TinyJit) the pieces become one graph with one memory plan.
"""

from collections.abc import Callable, Hashable, Sequence
from weakref import WeakSet

from tinygrad import Tensor
from tinygrad.engine.realize import capturing, run_linear
from tinygrad.helpers import Context
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import precompile
from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.patches import install

Build = Callable[[], Sequence[Tensor]]

_passing: WeakSet[UOp] = WeakSet()


class _Template:
    """A scheduled piece: its kernels over the buffers of the tensors it was made from."""

    def __init__(self, tensors: Sequence[Tensor], build: Build) -> None:
        self.inputs = _buffers(tensors)
        outputs = list(build())
        pending = [t for t in outputs if not t.uop.has_buffer_identity()]
        # Planning memory is left to the step that the pieces become part of.
        with Context(CAPTURING=0, NO_MEMORY_PLANNER=1):
            self.kernels, variables = Tensor.linear_with_vars(*pending)
        assert not variables
        self.outputs = [(_buffer(t), t.shape) for t in outputs]
        used = {u for u in self.kernels.toposort() if u.op is Ops.BUFFER}
        self.sources = {u.arg for u in self.kernels.toposort() if u.op is Ops.SOURCE}
        self.internal = used - set(self.inputs)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The piece on these tensors; its outputs are new, or inputs that were updated."""
        places = dict(zip(self.inputs, _buffers(tensors), strict=True))
        places |= {b: UOp.new_buffer(b.device, b.arg, b.dtype) for b in self.internal}
        kernels = self.kernels.substitute(places, walk=True)
        if capturing:
            precompile.start(self.sources)
            capturing[0].add_linear(kernels, {})
        else:
            finish_background_writes()
            run_linear(kernels)
        return [Tensor(places[b].reshape(shape)) for b, shape in self.outputs]


class Stage:
    """One kind of piece. Call it with the tensors it reads and how to build it from them."""

    def __init__(self) -> None:
        install()
        self._templates: dict[Hashable, _Template] = {}

    def __call__(
        self, tensors: Sequence[Tensor], build: Build, key: Hashable = None
    ) -> list[Tensor]:
        """Run on `tensors`, whole realized buffers, all different.

        `build` returns the outputs, computed from `tensors` and nothing else; it is called once
        for each combination of shapes, types and `key`. Outputs are realized, or in a captured
        step will be; one may be an input that a kernel updates in place.
        """
        signature = (key, tuple((t.shape, t.dtype, t.device) for t in tensors))
        template = self._templates.get(signature)
        if template is None:
            template = self._templates[signature] = _Template(tensors, build)
        return template.run(tensors)


def passing(tensor: Tensor) -> Tensor:
    """`tensor`, not kept for the gradient: its memory costs more than to compute it again."""
    _passing.add(tensor.uop)
    return tensor


def materialized(
    out: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Tensors that computing `out` from `inputs` writes to memory, other than `out` itself and what
    is `passing`.

    What is made of `weights` alone (a packed one that was widened) is not to be kept either.
    """
    known = {t.uop for t in (*inputs, *weights)}
    varying = {t.uop for t in inputs}
    found: dict[UOp, None] = {}
    for uop in out.uop.toposort(gate=lambda u: u not in known):
        if varying.isdisjoint(uop.src):
            continue
        varying.add(uop)
        if uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL:
            call = uop.src[1]  # all that the kernel wrote, also what only a gradient reads
            found |= {call.src[1 + i].after(call): None for i in call.src[0].arg.outs}
        elif uop.op is Ops.CONTIGUOUS and uop not in _passing and not _is_blank(uop):
            found[uop] = None
    return [Tensor(uop) for uop in found if uop is not out.uop and uop not in known]


def replaced(
    tensors: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]
) -> list[Tensor]:
    """`tensors` with `new` read wherever they would compute `old`."""
    places = {a.uop: b.uop for a, b in zip(old, new, strict=True)}
    sink = UOp.sink(*(t.uop for t in tensors)).substitute(places, walk=True)
    return [Tensor(uop) for uop in sink.src]


def _is_blank(uop: UOp) -> bool:
    """A buffer that a kernel is about to fill: nothing to keep."""
    return uop.op is Ops.CONTIGUOUS and uop.src[0].base.op is Ops.CONST


def _buffer(tensor: Tensor) -> UOp:
    base: UOp = tensor.uop.base
    assert base.op is Ops.BUFFER, f"a stage works on whole buffers, not on {base.op}"
    return base


def _buffers(tensors: Sequence[Tensor]) -> list[UOp]:
    """All different: one that is updated in place must not be another input of the same piece."""
    found = [_buffer(t) for t in tensors]
    assert len(set(found)) == len(found), "a stage got the same tensor twice"
    return found
