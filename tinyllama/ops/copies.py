"""Copies of float32 weights in the type of activations, which products read instead.

A product rounds its weight to the type of activations: a GPU has a kernel for that before it
(narrow.py), a CPU that multiplies bfloat16 does it while it packs. A copy holds the rounded numbers
already, so results are the same bits, and half as much is read. AdamW writes it (adamw.py).

Products are built, and differentiated, as if there were no copies; `reading_copies` then changes
the graph. Few rows, which a CPU multiplies without rounding, go on reading the weights.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops, UOp

from tinyllama.ops import forms
from tinyllama.ops.gpu import narrow as gpu
from tinyllama.runtime import blocks, c_kernel, kernel, sources
from tinyllama.runtime.c_kernel import Kernel
from tinyllama.runtime.stage import is_narrowed

# By the program of a product on the CPU that rounds its right factor: the kernel that reads it
# rounded.
_rounding: WeakKeyDictionary[UOp, Kernel] = WeakKeyDictionary()
_RIGHT = 1  # among the inputs of a product


def pay(weight: Tensor, dtype: DType) -> bool:
    """Whether a step is faster with a copy of this weight in the type of activations.

    On a GPU nothing is narrowed then. AMX waits for packing, much of which is conversion;
    `vdpbf16ps` is slow enough to hide that (NOTES.md). In portable form the update would read p
    again.
    """
    form = forms.chosen(weight)
    if form == "cpu":
        return dtype == dtypes.bfloat16 and c_kernel.has_amx()
    return form == "gpu" and dtype.itemsize == 2


def note(result: Tensor, reading_rounded: Kernel) -> None:
    """Note that a kernel wrote a product and rounded its right factor, and which other kernel reads
    that factor in bfloat16."""
    call = kernel.written(result).uop.src[1]
    _rounding[call.src[0]] = reading_rounded


def reading_copies(
    tensors: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The same tensors, in which products read the copy of each pair of a weight and its copy.

    The new graph has no gradients: apply this after differentiating.
    """
    if not copies:
        return list(tensors)
    known = {weight.uop: copy for weight, copy in copies}
    sink = UOp.sink(*(t.uop for t in tensors))
    places: dict[UOp, UOp] = {}
    for uop in sink.toposort():
        given = tuple(places[source] for source in uop.src)
        place = uop if given == uop.src else uop.replace(src=given)
        places[uop] = _reading(uop, place, known)
    changed = places[sink]
    if sources.tracking():
        sources.carried(sink.src, changed.src)
    return [Tensor(uop) for uop in changed.src]


def _reading(uop: UOp, place: UOp, known: Mapping[UOp, Tensor]) -> UOp:
    """`place`, which stands for `uop`, reading a copy if `uop` rounds a weight that has one."""
    if uop.op is Ops.CALL and uop.src[0] in _rounding:
        copy = known.get(kernel.buffers_of(uop)[1][_RIGHT])
        if copy is not None:
            return c_kernel.reading(place, _RIGHT, copy, _rounding[uop.src[0]])
    if uop.op is Ops.CAST and uop.src[0] in known and uop.dtype == known[uop.src[0]].dtype:
        return known[uop.src[0]].uop
    if place.op is Ops.CONTIGUOUS and place is not uop and place.src[0].has_buffer_identity():
        return place.src[0]  # the copy, which is in memory already
    return place


def without_copies(
    saved: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Of what a piece saves, all but narrowed weights that have a copy."""
    known = {weight.uop for weight, _ in copies}
    return [t for t in saved if not is_narrowed(t.uop, known)]


def copied(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """The copies, written: each weight rounded as its products round it."""
    form = forms.choose(*weights, portable=_portable, cpu=_cpu, gpu=_gpu)
    return form(weights, copies)


def _portable(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    return [copy.assign(w.cast(copy.dtype)) for w, copy in zip(weights, copies, strict=True)]


def _cpu(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    results = []
    for weight, copy in zip(weights, copies, strict=True):
        assert copy.dtype == dtypes.bfloat16
        narrow = Kernel("narrow.c", {}, {"COUNT": weight.numel()}, ["pairs.h"])
        results += c_kernel.run(narrow, [copy], [weight])
    return results


def _gpu(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    dialect, results = blocks.language(weights[0])[0], list[Tensor]()
    most = gpu.MOST_TENSORS[dialect]
    for first in range(0, len(weights), most):
        some, places = weights[first : first + most], copies[first : first + most]
        launch = gpu.narrow(dialect, [w.numel() for w in some], blocks.TYPE_NAME[places[0].dtype])
        results += blocks.run(launch, places, some)
    return results
