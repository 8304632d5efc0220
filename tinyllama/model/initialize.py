"""The weights a new model starts from.

Normal with standard deviation 0.02, the two projections that write into the residual stream
0.02 / sqrt(2 L) (GPT-2, Radford et al. 2019), norms 1, biases 0. Numbers come from numpy,
from the seed and the parameter's name alone, so that runs on every backend and with any number of
threads start with the same weights. Each number is one of 65,536 quantiles of the normal
distribution, chosen by 16 random bits, which takes a sixth of the time of numpy's normal numbers.
"""

import functools
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.runtime import storage

STANDARD_DEVIATION = 0.02
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
# Numbers per generator: parts of this size are made in parallel.
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
        values.fill(0 if name.endswith(".bias") else 1)
        return
    deviation = STANDARD_DEVIATION
    if name.endswith(RESIDUAL_PROJECTIONS):
        deviation /= math.sqrt(2 * num_layers)
    table = quantiles() * np.float32(deviation)
    flat = values.reshape(-1)
    starts = range(0, flat.size, PART_ELEMENTS)
    list(pool.map(lambda start: _fill_part(flat, start, table, seed, name), starts))


def _fill_part(
    values: npt.NDArray[np.float32],
    start: int,
    table: npt.NDArray[np.float32],
    seed: int,
    name: str,
) -> None:
    part = values[start : start + PART_ELEMENTS]
    bits = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode()), start]))
    words = bits.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
    # All indices are valid: with "clip" numpy does not check them.
    np.take(table, words.view("<u2")[: part.size], out=part, mode="clip")


@functools.cache
def quantiles() -> npt.NDArray[np.float32]:
    """Quantiles of the standard normal distribution at (i + 1/2) / 65536; their standard
    deviation is 0.99999, the largest is 4.3."""
    half = 1 << 15
    normal = statistics.NormalDist()
    upper = [normal.inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)]
    return np.array([-x for x in reversed(upper)] + upper, np.float32)
