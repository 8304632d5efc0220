"""Weights in the type of activations, as a GPU's products read them: y = x, rounded.

Each product narrows its own weight; here the weights of a piece of a step are narrowed by one
kernel, since most of them are too small to fill a GPU, and a launch takes a microsecond or two.
"""

from collections.abc import Sequence

from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from tinyllama.ops import forms
from tinyllama.ops.gpu import narrow as gpu
from tinyllama.runtime import blocks, sources
from tinyllama.runtime.kernel import empty, written
from tinyllama.runtime.stage import is_narrowed


def narrow_together(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, in which float32 `weights` that kernels read narrowed share a launch.

    The new graph has no gradients: apply this after differentiating.
    """
    sink = UOp.sink(*(t.uop for t in tensors))
    known = {t.uop for t in weights}
    found = [uop for uop in sink.toposort() if is_narrowed(uop, known)]
    if not found or forms.chosen(_weight(found[0])) != "gpu":
        return list(tensors)
    most = gpu.MOST_TENSORS[blocks.language(_weight(found[0]))[0]]
    places: dict[UOp, UOp] = {}
    for dtype in dict.fromkeys(uop.dtype for uop in found):
        alike = [uop for uop in found if uop.dtype == dtype]
        for start in range(0, len(alike), most):
            places |= _narrowed(alike[start : start + most])
    narrowed = sink.substitute(places, walk=True)
    if sources.tracking():
        sources.carried(sink.src, narrowed.src)
    return [Tensor(uop) for uop in narrowed.src]


def _weight(narrowed: UOp) -> Tensor:
    return Tensor(narrowed.src[0].src[0])


def _narrowed(uops: Sequence[UOp]) -> dict[UOp, UOp]:
    """What takes the place of each of these, all of one type: the output of a common kernel."""
    wide = [_weight(uop) for uop in uops]
    dialect, _ = blocks.language(wide[0])
    dtype = uops[0].dtype
    launch = gpu.narrow(dialect, [w.numel() for w in wide], blocks.TYPE_NAME[dtype])
    outputs = [empty(*w.shape, dtype=dtype, device=w.device) for w in wide]
    results = blocks.run(launch, outputs, wide)
    return {uop: written(result).uop for uop, result in zip(uops, results, strict=True)}
