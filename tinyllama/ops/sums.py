"""Sums of matrix products, in which each product adds the sum of those before it.

The gradient of a tensor that several layers read is a sum: dx = dq Wq + dk Wk + dv Wv, with twice
as many terms if there are adapters. Each term is the result of a kernel that can add another tensor
while it writes its own (ADDEND of gemm.c), which saves a pass over memory.

In the portable form tinygrad would put all the products of a sum into one kernel, and a kernel with
several products cannot use tensor cores: on an NVIDIA H200 such kernels reached 5 TFLOPS in
bfloat16, others 33. So each product gets a kernel of its own there too.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, UOp

from tinyllama.runtime import kernel, sources

# A kernel's inputs and an addend like its first output -> its outputs, of which the first has the
# addend added.
Adding = Callable[..., Sequence[Tensor]]
_adding: WeakKeyDictionary[UOp, Adding] = WeakKeyDictionary()


def remember(result: Tensor, inputs: Sequence[Tensor], adding: Adding) -> Tensor:
    """Note how to compute a kernel's first output plus another tensor; returns that output.

    Nothing is noted of what no kernel of ours wrote.
    """
    written = kernel.written(result).uop
    if written.op is not Ops.AFTER:
        return result
    shapes = [t.shape for t in (*inputs, result)]  # in a graph the buffers are flat

    def adding_flat(*given: Tensor) -> Sequence[Tensor]:
        return adding(*(t.reshape(shape) for t, shape in zip(given, shapes, strict=True)))

    _adding[_call(written).src[0]] = adding_flat
    return result


def into_products(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, in which products that nothing else reads also compute the sums.

    The new graph has no gradients: apply this after differentiating.
    """
    sink = UOp.sink(*(t.uop for t in tensors))
    order = sink.toposort()
    readers = _readers(order)
    places: dict[UOp, UOp] = {}
    others: dict[UOp, UOp] = {}  # further outputs of kernels that were replaced by adding ones
    for uop in order:
        given = tuple(places[source] for source in uop.src)
        if given == uop.src:
            place = uop
        elif uop.op is Ops.CONTIGUOUS and _is_written(given[0]):
            place = given[0]  # the product has already written the sum to memory
        elif uop.op is Ops.CALL:
            place = uop.replace(src=tuple(kernel.written(Tensor(s)).uop for s in given))
        else:
            place = uop.replace(src=given)
        if uop.op is Ops.ADD:
            place = _apart(_added(uop, place, readers, others))
        elif uop.op is Ops.REDUCE:
            place = _reduced_apart(place)
        places[uop] = place
    result = places[sink].substitute(others, walk=True) if others else places[sink]
    if sources.tracking():
        sources.carried(sink.src, result.src)
    return [Tensor(uop) for uop in result.src]


def read_by_gradients(out: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    """Of what computing `out` wrote, all but products that are only added to something.

    The gradient of a sum reads none of its terms.
    """
    order = out.uop.toposort()
    readers, summed = _readers(order), {s for uop in order if uop.op is Ops.ADD for s in uop.src}
    alone = {kernel.written(Tensor(s)).uop for s in summed if _only_summed(s, readers)}
    return [t for t in saved if t.uop not in alone or _call(t.uop).src[0] not in _adding]


def _readers(order: Iterable[UOp]) -> Counter[UOp]:
    """How many nodes read each node."""
    return Counter(source for uop in order for source in uop.src)


def _added(uop: UOp, place: UOp, readers: Counter[UOp], others: dict[UOp, UOp]) -> UOp:
    """The sum `uop`, now `place`, computed by one of its terms if that is a kernel that adds."""
    for term, other in ((1, 0), (0, 1)):
        if not _only_summed(uop.src[term], readers):
            continue
        call = _call(kernel.written(Tensor(place.src[term])).uop)
        adding = _adding.get(call.src[0])
        if adding is not None:
            old, inputs = kernel.buffers_of(call)
            with sources.made_for(call):
                total, *new = adding(*map(Tensor, inputs), Tensor(place.src[other]))
            for before, after in zip(old[1:], new, strict=False):  # scratch is not among the new
                others[before.after(call)] = kernel.written(after).uop
            return total.reshape(uop.shape).uop
    return place


def _apart(place: UOp) -> UOp:
    """A sum, with its first term put into memory if both terms are products."""
    if place.op is not Ops.ADD or not all(_computes_product(term) for term in place.src):
        return place
    return place.src[0].contiguous() + place.src[1]


def _reduced_apart(place: UOp) -> UOp:
    """A reduction over the terms of several products, as a sum of one reduction for each product.

    tinygrad adds the terms of products of one shape before it reduces them.
    """
    terms = _terms(place.src[0]) if place.arg[0] is Ops.ADD else []
    if len(terms) < 2:
        return place
    products = [place.replace(src=(term, *place.src[1:])) for term in terms]
    return functools.reduce(lambda total, product: total.contiguous() + product, products)


def _terms(uop: UOp) -> list[UOp]:
    """The terms of an elementwise sum, if each multiplies elements of two tensors; else nothing."""
    if uop.op is Ops.CAST:
        return [term.cast(uop.dtype) for term in _terms(uop.src[0])]
    if uop.op is Ops.ADD:
        first, second = map(_terms, uop.src)
        return [*first, *second] if first and second else []
    spread = uop.op is Ops.MUL and all(_uncast(source).op is Ops.EXPAND for source in uop.src)
    return [uop] if spread else []


def _computes_product(uop: UOp) -> bool:
    """Whether a kernel that reads this would compute a matrix product for it."""
    if uop.op in (Ops.RESHAPE, Ops.PERMUTE, Ops.CAST):
        return _computes_product(uop.src[0])
    if uop.op is Ops.ADD:
        return any(map(_computes_product, uop.src))
    return uop.op is Ops.REDUCE and uop.arg[0] is Ops.ADD and bool(_terms(uop.src[0]))


def _uncast(uop: UOp) -> UOp:
    return _uncast(uop.src[0]) if uop.op is Ops.CAST else uop


def _is_written(uop: UOp) -> bool:
    """Whether a kernel wrote this, apart from reshapes."""
    return kernel.written(Tensor(uop)).uop.op is Ops.AFTER


def _only_summed(uop: UOp, readers: Counter[UOp]) -> bool:
    """Whether a kernel wrote this, apart from reshapes, and only one node reads it."""
    while uop.op is Ops.RESHAPE and readers[uop] == 1:
        uop = uop.src[0]
    return uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL and readers[uop] == 1


def _call(uop: UOp) -> UOp:
    """The call of the kernel that wrote this."""
    assert uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL
    return uop.src[1]
