"""Weights in 4 bits, in numpy: groups of `block_size` neighbours of a row share one scale.

scale = absmax / 7, rounded to float16
q     = w / scale, rounded to nearest even, -7 .. 7           |w - q scale| <= scale / 2
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import linear_shapes, linear_shapes_by_path
from tinyllama.formats.models import ModelSource
from tinyllama.formats.packed import PackedForm

LARGEST_Q = 7
# Elements that a thread handles at once: their float64 copy stays in the processor's cache.
PART_ELEMENTS = 1 << 16

Weights = npt.NDArray[np.float32]
Packed = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]


def quantize_rows(weight: Weights, block_size: int) -> Packed:
    """weight (rows, in) float32 -> packed (rows, in / 2), scales (rows, in / block_size).

    Raises ValueError for a value that is not finite, or too large for a float16 scale.
    """
    q, scales = _divided(weight, block_size)
    pairs = q.astype(np.int8).view("<u2").reshape(len(weight), -1)  # the even one is the low byte
    packed = (pairs & 0xF) | (pairs >> 4 & 0xF0)
    return packed.astype(np.uint8), scales


def as_packed(label: str, weight: Weights, block_size: int) -> Weights:
    """The values of a weight (rows, in) after packing: q scale, float32, exact.

    Raises WeightsError, beginning with `label`, for a value that 4 bits cannot hold.
    """
    dequantized = np.empty(weight.shape, np.float32)
    for rows in row_parts(weight.shape):
        try:
            q, scales = _divided(weight[rows], block_size)
        except ValueError as error:
            raise WeightsError(f"{label}: {error}") from error
        values = q.astype(np.float32) * scales.astype(np.float32)[..., None]
        dequantized[rows] = values.reshape(-1, weight.shape[1])
    return dequantized


class Packing(NamedTuple):
    """How the linear layers of a base are packed: in 4 bits in groups of `block_size`.

    Those that a GGUF file holds in blocks stay as they are where layers can multiply by them, and
    are widened otherwise, or with `requantize` packed in 4 bits as well.
    """

    block_size: int
    requantize: bool = False

    def stored(self, source: ModelSource | None) -> dict[str, PackedForm | None]:
        """Path of each layer that is held as `source` has it -> its form; None: it is widened."""
        if source is None:
            return {}
        names = [n for n in source.names if "_proj.weight" in n and source.is_quantized(n)]
        forms = {n.removesuffix(".weight"): source.packed_form(n) for n in names}
        return {path: form for path, form in forms.items() if form or not self.requantize}


def check_block_size(config: LlamaConfig, block_size: int, stored: Collection[str] = ()) -> None:
    """Raise ConfigError naming each kind of layer whose inputs `block_size` does not divide.

    Layers of the paths `stored` are not packed in such blocks.
    """
    shapes = linear_shapes_by_path(config)
    inputs = {p.rpartition(".")[2]: shape[1] for p, shape in shapes.items() if p not in stored}
    wrong = [f"{name} has {count}" for name, count in inputs.items() if count % block_size]
    if wrong:
        raise ConfigError(
            f"qlora.block_size: got {block_size}, must divide the inputs of every linear layer: "
            f"{', '.join(wrong)}; the largest that does is {largest_block(config, block_size)}"
        )


def largest_block(config: LlamaConfig, limit: int) -> int:
    """The largest block size up to `limit` that divides the inputs of every linear layer."""
    common = math.gcd(*(shape[1] for shape in linear_shapes(config).values()))
    return max(size for size in range(1, min(limit, common) + 1) if common % size == 0)


def row_parts(shape: Sequence[int]) -> list[slice]:
    """A tensor's rows in parts of about PART_ELEMENTS."""
    rows, *width = shape
    step = max(1, PART_ELEMENTS // math.prod(width))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _divided(
    weight: Weights, block_size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float16]]:
    """q (rows, groups, block_size) and the scales (rows, groups)."""
    groups = weight.reshape(len(weight), -1, block_size)
    absmax = np.maximum(groups.max(-1), -groups.min(-1))
    scales = _scales(absmax)
    divisors = scales.astype(np.float64)
    divisors[divisors == 0] = 1  # a group of zeros
    # A float64 quotient of a float32 and a float16 never rounds onto a tie, or off one.
    q = groups / divisors[..., None]
    np.rint(q, out=q)
    np.clip(q, -LARGEST_Q, LARGEST_Q, out=q)
    return q, scales


def _scales(absmax: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """absmax / 7 in float16: the nearest, or where that is too small (subnormals) the next.

    A scale of at least absmax / 7.5 keeps every value within half a scale of +-7 scales.
    """
    with np.errstate(over="ignore", under="ignore"):
        scales = (absmax / np.float32(LARGEST_Q)).astype(np.float16)
    wrong = ~np.isfinite(scales)
    if wrong.any():
        value = float(absmax[wrong][0])
        if not np.isfinite(value):
            raise ValueError("holds a value that is not finite")
        raise ValueError(f"{value:g} is too large for 4 bits with a float16 scale")
    small = scales.astype(np.float32) * np.float32(LARGEST_Q + 0.5) < absmax
    scales[small] = np.nextafter(scales[small], np.float16(np.inf))
    return scales
