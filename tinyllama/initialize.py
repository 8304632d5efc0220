"""The weights a new model starts from.

Normal with standard deviation 0.02, the two projections that write into the residual stream
0.02 / sqrt(2 L) (GPT-2, Radford et al. 2019), norms 1. Numbers come from numpy, from the seed and
the parameter's name alone, so that every backend and every number of threads starts equal.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.ops import storage

STANDARD_DEVIATION = 0.02
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
# Numbers one generator makes: parts of this size are made side by side.
PART_ELEMENTS = 1 << 20


def initialize(tensors: Mapping[str, Tensor], num_layers: int, seed: int) -> None:
    """Give every tensor (by its Hugging Face name) its first values, in place."""
    with ThreadPoolExecutor() as pool:
        for name, tensor in tensors.items():
            with storage.filling(tensor) as values:
                _fill(values, name, num_layers, seed, pool)


def first_values(
    name: str, shape: Sequence[int], num_layers: int, seed: int, pool: Executor
) -> npt.NDArray[np.float32]:
    """The first values of one parameter, by its Hugging Face name."""
    values = np.empty(shape, np.float32)
    _fill(values, name, num_layers, seed, pool)
    return values


def _fill(
    values: npt.NDArray[np.float32], name: str, num_layers: int, seed: int, pool: Executor
) -> None:
    if values.ndim == 1:
        values.fill(1)
        return
    deviation = STANDARD_DEVIATION
    if name.endswith(RESIDUAL_PROJECTIONS):
        deviation /= math.sqrt(2 * num_layers)
    flat = values.reshape(-1)
    starts = range(0, flat.size, PART_ELEMENTS)
    list(pool.map(lambda start: _fill_part(flat, start, deviation, seed, name), starts))


def _fill_part(
    values: npt.NDArray[np.float32], start: int, deviation: float, seed: int, name: str
) -> None:
    part = values[start : start + PART_ELEMENTS]
    key = np.random.SeedSequence([seed, zlib.crc32(name.encode()), start])
    np.random.Generator(np.random.SFC64(key)).standard_normal(out=part, dtype=np.float32)
    part *= np.float32(deviation)
