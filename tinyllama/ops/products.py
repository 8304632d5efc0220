"""Products of matrices on a GPU that share a launch, or the launch of what reads them.

Each product is put into the graph by itself (matmul.py), so that a layer need not know its
neighbours. Where one is read by an operation that its kernel can do while it writes its result
(swiglu.py, rope.py), that operation asks for its `factors` and multiplies them itself; the product
is then read by nobody and never runs. `together` gives products that have a factor in common one
launch. Both save passes over memory, which is what a GPU's step waits for.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from tinygrad import Tensor
from tinygrad.uop.ops import Ops, UOp

from tinyllama.ops.gpu.gemm import LAYOUTS, MOST_TOGETHER, Turned, best_cut, default_tile, product
from tinyllama.runtime import blocks, kernel, sources
from tinyllama.runtime.blocks import TF32X3
from tinyllama.runtime.kernel import Gradient, empty

# Layouts of gemm.c: C[M,N] = A[M,K] B[N,K]^T, A[M,K] B[K,N], A[K,M]^T B[K,N].
NT, NN, TN = 0, 1, 2


@dataclass(frozen=True)
class _Product:
    """What a product's kernel computes: `terms` pairs of factors of these M, N, K."""

    layout: int
    sizes: tuple[int, int, int]
    terms: int = 1
    split: int = 1
    turned: Turned | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of a and b."""
        m, n, k = self.sizes
        return (k, m) if self.layout == TN else (m, k), (n, k) if self.layout == NT else (k, n)


# By the kernel's program; equal products have the same.
_products: WeakKeyDictionary[UOp, _Product] = WeakKeyDictionary()


def note(
    result: Tensor,
    layout: int,
    sizes: tuple[int, int, int],
    *,
    terms: int = 1,
    split: int = 1,
    turned: Turned | None = None,
) -> None:
    """Note that a kernel wrote a product with nothing added, or its `split` parts."""
    call = _call(kernel.written(result).uop)
    assert call is not None
    _products[call.src[0]] = _Product(layout, sizes, terms, split, turned)


def factors(result: Tensor, layout: int) -> list[Tensor]:
    """a and b of the product that a kernel wrote to this tensor, and those of the further terms of
    a sum; nothing if no such product did."""
    call = _call(kernel.written(result).uop)
    known = None if call is None else _products.get(call.src[0])
    if call is None or known is None or known.layout != layout or known.turned or known.split > 1:
        return []
    inputs = kernel.buffers_of(call)[1]
    shapes = known.shapes * known.terms
    return [Tensor(uop).reshape(shape) for uop, shape in zip(inputs, shapes, strict=True)]


def turned(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor, head: int, gradient: Gradient) -> Tensor:
    """a (N, in) b (out, in)^T, in heads of `head` columns that are turned by cos and sin, each (T,
    head / 2), row r as position r % T: see rope.py. Raises UnsupportedSize."""
    dialect, dtype = blocks.language(a)
    (m, k), n, turn = a.shape, b.shape[0], Turned(head, cos.shape[0])
    launch = product(dialect, "NT", m, n, k, dtype, turned=turn)
    out = empty(m, n, dtype=a.dtype, device=a.device)
    result = blocks.run(launch, [out], [a, b, cos, sin], gradient)[0]
    note(result, NT, (m, n, k), turned=turn)
    return result


def gated(x: Tensor, gate: Tensor, up: Tensor, gradient: Gradient) -> list[Tensor]:
    """silu(x gate^T) x up^T and both products (N, I): x (N, in), gate and up (I, in). Raises
    UnsupportedSize."""
    dialect, dtype = blocks.language(x)
    (m, k), n = x.shape, gate.shape[0]
    launch = product(dialect, "NT", m, n, k, dtype, gated=True)
    outputs = [empty(m, n, dtype=x.dtype, device=x.device) for _ in range(3)]
    return blocks.run(launch, outputs, [x, gate, up], gradient)


def ungated(dy: Sequence[Tensor], gate: Tensor, up: Tensor) -> list[Tensor]:
    """The gradients of gate and up (N, I) from that of silu(gate) up, which is the product of the
    two factors `dy`, (N, K) and (K, I). Raises UnsupportedSize."""
    a, b = dy
    dialect, dtype = blocks.language(a)
    launch = product(dialect, "NN", a.shape[0], b.shape[1], a.shape[1], dtype, ungated=True)
    outputs = kernel.empty_like(gate, up)
    return blocks.run(launch, outputs, [a, b, gate, up])


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, in which products of one size with a factor in common share a launch.

    That is the left one of layers (NT), which read the same x, and the right one of the gradients
    of their weights (TN). The new graph has no gradients: apply this after differentiating.
    """
    sink = UOp.sink(*(t.uop for t in tensors))
    # One group after another: a later one may read what an earlier one computes.
    while places := next(filter(None, map(_batched, _groups(sink))), None):
        sink = sink.substitute(places, walk=True)
    return [Tensor(uop) for uop in sink.src]


def _groups(sink: UOp) -> Iterator[dict[UOp, UOp]]:
    """Results of products that can share a launch, each with the call of its kernel."""
    alike: dict[tuple[object, ...], dict[UOp, UOp]] = {}
    for uop in sink.toposort():
        call = _call_of_result(uop)
        if call is not None:
            known, (a, b, *_) = _products[call.src[0]], kernel.buffers_of(call)[1]
            key = known.layout, known.sizes, uop.dtype, a if known.layout == NT else b
            alike.setdefault(key, {})[uop] = call
    for group in alike.values():
        # Those that are turned come first, as their kernel wants it.
        results = sorted(group, key=lambda uop: _products[group[uop].src[0]].turned is None)
        for first in range(0, len(results) - 1, MOST_TOGETHER):
            some = results[first : first + MOST_TOGETHER]
            if len(some) > 1:
                yield {result: group[result] for result in some}


def _call(uop: UOp) -> UOp | None:
    """The call of the kernel that wrote this, if one did."""
    is_written = uop.op is Ops.AFTER and uop.src[1].op is Ops.CALL
    return uop.src[1] if is_written else None


def _call_of_result(uop: UOp) -> UOp | None:
    """The call of the kernel that computes this product, also in parts, if it can share a launch
    and is one of those that `together` puts together."""
    source = uop
    while uop.op is Ops.CONTIGUOUS and source.op in _FROM_PARTS:
        source = source.src[0]
    call = _call(source)
    known = None if call is None else _products.get(call.src[0])
    if known is None or known.layout == NN or (known.split > 1) != (source is not uop):
        return None
    return call


_FROM_PARTS = (Ops.CONTIGUOUS, Ops.CAST, Ops.RESHAPE, Ops.REDUCE)


def _batched(group: dict[UOp, UOp]) -> dict[UOp, UOp]:
    """What takes the place of each result of these calls: that of one launch for all; nothing if no
    launch computes them."""
    calls = list(group.values())
    known = [_products[call.src[0]] for call in calls]
    inputs = [kernel.buffers_of(call)[1] for call in calls]
    turns = [(k.turned, i[2:]) for k, i in zip(known, inputs, strict=True) if k.turned]
    if len(set(turns)) > 1:
        return {}
    (m, n, k), layout, out = known[0].sizes, known[0].layout, next(iter(group)).dtype
    a, b = map(Tensor, inputs[0][:2])
    dialect, dtype = blocks.language(a)
    tile, split = default_tile(dialect, m, n, dtype), 1
    if layout == TN:
        multiprocessors = blocks.multiprocessors(a.device)
        tile, split = best_cut(dialect, m, n, k, dtype, multiprocessors, batch=len(calls))
        if len(calls) == 2 and tile.bm == 128 and blocks.fragments(dialect, dtype) == TF32X3:
            return {}  # it takes a few registers more than there are
    turned = dataclasses.replace(turns[0][0], results=len(turns)) if turns else None
    launch = product(
        dialect, LAYOUTS[layout], m, n, k, dtype, blocks.TYPE_NAME[out], tile=tile, split=split,
        batch=len(calls), turned=turned,
    )  # fmt: skip
    shape = (m, n) if split == 1 else (split, m, n)
    outputs = [empty(*shape, dtype=out, device=a.device) for _ in calls]
    others = [Tensor(i[1 if layout == NT else 0]) for i in inputs[1:]]
    angles = [Tensor(uop) for uop in turns[0][1]] if turns else []
    with sources.made_for(*calls):
        results = blocks.run(launch, outputs, [a, b, *others, *angles])
        if split > 1:
            results = [part.sum(0).contiguous() for part in results]
    return {
        old: kernel.written(new).uop.reshape(old.shape)
        for old, new in zip(group, results, strict=True)
    }
