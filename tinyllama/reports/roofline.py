"""A roofline: what the machine can do, and where the operations of a profile lie below it.

    attainable GFLOPS = min(peak, bytes per second * operations per byte)

(Williams, Waterman and Patterson 2009.) The ceilings are measured here, with the kernels that
training uses: products of matrices for the peaks, a sum of two long vectors for the bandwidth.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.ops.matmul import linear
from tinyllama.reports.profile import Operation, Profile
from tinyllama.runtime.capture import captured, synchronize

_TRIES = 12
_SIZES = (512, 1024)  # of square matrices, on the CPU: the smaller fit its caches
_GPU_SIZES = (4096,)  # a GPU needs larger ones to be busy
_NAMED = 6  # operations that the picture names
_ELEMENTS = 1 << 24  # of each vector: 64 MiB, more than caches hold


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: billions of operations, and of bytes, per second."""

    float32: float
    bfloat16: float
    gb_per_second: float

    def as_dict(self) -> dict[str, float]:
        """As roofline.json has them."""
        return {
            "float32_gflops": self.float32,
            "bfloat16_gflops": self.bfloat16,
            "gb_per_second": self.gb_per_second,
        }


def measure_ceilings() -> Ceilings:
    """Measure the selected device: the best of a few tries each. Takes a second."""
    sizes = _SIZES if Tensor.empty(1).device == "CPU" else _GPU_SIZES
    peaks = [max(_gflops(n, dtype) for n in sizes) for dtype in (dtypes.float32, dtypes.bfloat16)]
    x, y = (Tensor.ones(_ELEMENTS).contiguous().realize() for _ in range(2))
    seconds = _best(captured(lambda x, y: (x + y).contiguous().realize()), x, y)
    return Ceilings(peaks[0], peaks[1], 3 * 4 * _ELEMENTS / seconds / 1e9)


def _gflops(n: int, dtype: DType) -> float:
    """The speed of a product of two n x n matrices."""
    a, b = (Tensor.ones(n, n).cast(dtype).contiguous().realize() for _ in range(2))
    seconds = _best(captured(lambda a, b: linear(a, b).contiguous().realize()), a, b)
    return 2 * n**3 / seconds / 1e9


def _best(step: Callable[..., Tensor], *inputs: Tensor) -> float:
    """The seconds of the quickest of a few runs, after two that compile and touch memory."""
    best = math.inf
    for number in range(2 + _TRIES):
        synchronize()
        begun = time.perf_counter()
        step(*inputs)
        synchronize()
        if number >= 2:
            best = min(best, time.perf_counter() - begun)
    return best


def points(profile: Profile) -> list[Operation]:
    """The operations that a roofline shows: those that compute."""
    return [o for o in profile.operations if o.flops and o.nbytes and o.seconds]


def draw_roofline(profile: Profile, ceilings: Ceilings, *files: Path) -> None:
    """Draw the ceilings and the operations, larger where they take more of the step.

    Raises ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=144, layout="constrained")
    operations = points(profile)
    intensities = [o.flops / o.nbytes for o in operations] or [1.0]
    low, high = min(0.05, *intensities), max(300.0, *intensities) * 1.5
    _draw_ceilings(axes, ceilings, low, high)
    for is_backward, colour, label in (
        (False, "#2f6f9f", "forward"),
        (True, "#d1495b", "backward"),
    ):
        shown = [o for o in operations if o.name.endswith("(backward)") is is_backward]
        axes.scatter(
            [o.flops / o.nbytes for o in shown], [o.gflops for o in shown],
            s=[20 + 1500 * o.share for o in shown], color=colour, alpha=0.55, label=label,
        )  # fmt: skip
    hottest = sorted(operations, key=lambda o: -o.share)[:_NAMED]
    for number, o in enumerate(hottest, 1):
        axes.annotate(str(number), (o.flops / o.nbytes, o.gflops), ha="center", va="center")
    names = "\n".join(f"{number}  {_label(o)}" for number, o in enumerate(hottest, 1))
    axes.text(0.02, 0.98, names, transform=axes.transAxes, va="top", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high), title=f"Roofline of {profile.what}")
    axes.set(xlabel="operations per byte", ylabel="GFLOPS")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="lower right")
    for file in files:
        figure.savefig(file)
    pyplot.close(figure)


def _label(operation: Operation) -> str:
    line = operation.source[-1] if operation.source else ""
    back = " backward" * operation.name.endswith("(backward)")
    return f"{operation.share:4.0%}  {operation.name.partition('_')[0]}{back}, {line}"


def _draw_ceilings(axes: Any, ceilings: Ceilings, low: float, high: float) -> None:
    peaks = (("float32", ceilings.float32, "-"), ("bfloat16", ceilings.bfloat16, "--"))
    for name, peak, style in peaks:
        ridge = peak / ceilings.gb_per_second
        axes.plot(
            [low, ridge, high], [low * ceilings.gb_per_second, peak, peak], style, color="#555555",
            linewidth=1.3, label=f"{name}: {peak:,.0f} GFLOPS, {ceilings.gb_per_second:,.1f} GB/s",
        )  # fmt: skip
