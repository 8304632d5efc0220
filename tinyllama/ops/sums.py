"""Sums of products: each product adds what came before it, instead of a pass of its own.

A tensor that several layers read has the sum of their gradients: dx = dq Wq + dk Wk + dv Wv, twice
that with adapters. Every term is a kernel's result, and a kernel of products adds another tensor
while it writes its own (ADDEND of cpu/gemm.c).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, UOp

from tinyllama.ops import kernel

# A kernel's inputs and an addend like its result -> the result plus the addend.
Adding = Callable[..., Tensor]
_adding: WeakKeyDictionary[UOp, Adding] = WeakKeyDictionary()


def remember(result: Tensor, inputs: Sequence[Tensor], adding: Adding) -> Tensor:
    """Note how to compute a kernel's result plus something; returns the result."""
    shapes = [t.shape for t in (*inputs, result)]  # a graph knows flat buffers alone

    def adding_flat(*given: Tensor) -> Tensor:
        return adding(*(t.reshape(shape) for t, shape in zip(given, shapes, strict=True)))

    _adding[_call(kernel.written(result).uop).src[0]] = adding_flat
    return result


def into_products(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, with sums taken by the products in them that nothing else reads.

    What they are made of loses its gradient: it is for graphs that are differentiated already.
    """
    sink = UOp.sink(*(t.uop for t in tensors))
    order = sink.toposort()
    readers = Counter(source for uop in order for source in uop.src)
    places: dict[UOp, UOp] = {}
    for uop in order:
        sources = tuple(places[source] for source in uop.src)
        if sources == uop.src:
            place = uop
        elif uop.op is Ops.CONTIGUOUS and _is_written(sources[0]):
            place = sources[0]  # it asked for the sum in memory, where the product has put it
        elif uop.op is Ops.CALL:
            place = uop.replace(src=tuple(kernel.written(Tensor(s)).uop for s in sources))
        else:
            place = uop.replace(src=sources)
        places[uop] = _added(uop, place, readers) if uop.op is Ops.ADD else place
    return [Tensor(uop) for uop in places[sink].src]


def _added(uop: UOp, place: UOp, readers: Counter[UOp]) -> UOp:
    """The sum `uop`, which has become `place`, taken by one of its terms if that is a product."""
    for term, other in ((1, 0), (0, 1)):
        if not _only_summed(uop.src[term], readers):
            continue
        call = _call(kernel.written(Tensor(place.src[term])).uop)
        adding = _adding.get(call.src[0])
        if adding is not None:
            inputs = [Tensor(source) for source in call.src[1 + len(call.src[0].arg.outs) :]]
            return adding(*inputs, Tensor(place.src[other])).reshape(uop.shape).uop
    return place


def _is_written(uop: UOp) -> bool:
    """Whether this is what a kernel wrote, reshaped or not."""
    return kernel.written(Tensor(uop)).uop.op is Ops.AFTER


def _only_summed(uop: UOp, readers: Counter[UOp]) -> bool:
    """Whether this is what a kernel wrote, reshaped or not, and is read once."""
    while uop.op is Ops.RESHAPE and readers[uop] == 1:
        uop = uop.src[0]
    return uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL and readers[uop] == 1


def _call(uop: UOp) -> UOp:
    """The kernel's call behind what it wrote."""
    assert uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL
    return uop.src[1]
