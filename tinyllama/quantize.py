"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), packed as it is read.

    scale = absmax / 7 of `block_size` neighbours of a row, rounded to float16
    q     = w / scale, rounded to nearest even, -7 .. 7           |w - q scale| <= scale / 2

Every linear layer of the blocks is packed. The embedding and the head are held in bfloat16 and
the norms in float32. A checkpoint is read a tensor at a time, a few rows of it at once, so that
loading holds little more than the result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama import device
from tinyllama.config import LlamaConfig, QloraConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.layers import Embedding, Linear, block_linears
from tinyllama.model import Llama
from tinyllama.ops.int4 import dequantize, int4_linear
from tinyllama.ops.storage import filling
from tinyllama.weights.dtypes import Array, RawArray, convert, to_float32
from tinyllama.weights.hf_names import llama_shapes
from tinyllama.weights.hf_read import HfFolder, open_folder

LARGEST_Q = 7
# What a thread works on at once: its float64 copy stays in the processor's cache.
PART_ELEMENTS = 1 << 16

# Some rows of a tensor, as they are stored.
Rows = Callable[[slice], Array]
Packed = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]


class Int4Linear:
    """y = x W^T with W in 4 bits, without bias and without a gradient of W.

    packed: (out_features, in_features / 2) uint8; scales: (out_features, in_features / block_size)
    float16; both as ops/int4.py reads them. Raises ConfigError if block_size does not divide.
    """

    def __init__(self, in_features: int, out_features: int, block_size: int) -> None:
        if in_features % block_size or block_size % 2:
            raise ConfigError(
                f"qlora.block_size: got {block_size}, must be an even divisor of {in_features}, "
                "the inputs of a linear layer"
            )
        self.in_features, self.out_features = in_features, out_features
        self.packed = Tensor.empty(out_features, in_features // 2, dtype=dtypes.uint8)
        self.scales = Tensor.empty(out_features, in_features // block_size, dtype=dtypes.float16)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return int4_linear(x, self.packed, self.scales)

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) float32 that this layer multiplies by, exactly."""
        return dequantize(self.packed, self.scales)


def quantize_rows(weight: npt.NDArray[np.float32], block_size: int) -> Packed:
    """weight (rows, in) float32 -> packed (rows, in / 2), scales (rows, in / block_size).

    Raises ValueError for a value that is not finite, or too large for a float16 scale.
    """
    rows = weight.shape[0]
    groups = weight.reshape(rows, -1, block_size)
    absmax = np.maximum(groups.max(-1), -groups.min(-1))
    scales = _scales(absmax)
    divisors = scales.astype(np.float64)
    divisors[divisors == 0] = 1  # a group of zeros
    # A float64 quotient of a float32 and a float16 never rounds onto a tie, or off one.
    q = groups / divisors[..., None]
    np.rint(q, out=q)
    np.clip(q, -LARGEST_Q, LARGEST_Q, out=q)
    pairs = q.astype(np.int8).view("<u2").reshape(rows, -1)  # the even one is the low byte
    packed = (pairs & 0xF) | (pairs >> 4 & 0xF0)
    return packed.astype(np.uint8), scales


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


def packed_linears(model: Llama, block_size: int) -> Llama:
    """Make every linear layer of the blocks an Int4Linear, and embedding and head bfloat16.

    In place; nothing gets memory or values yet. Raises ConfigError.
    """
    check_block_size(model.config, block_size)
    for _, owner, name in list(block_linears(model.model.layers)):
        layer = getattr(owner, name)
        setattr(owner, name, Int4Linear(layer.in_features, layer.out_features, block_size))
    tables: list[Embedding | Linear] = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head)
    for table in tables:
        table.weight = Tensor.empty(*table.weight.shape, dtype=dtypes.bfloat16)
    return model


def check_block_size(config: LlamaConfig, block_size: int) -> None:
    """Raise ConfigError naming each kind of layer whose inputs `block_size` does not divide."""
    layer = {n.split(".")[-2]: s for n, s in llama_shapes(config).items() if "_proj" in n}
    wrong = [f"{name} has {shape[1]}" for name, shape in layer.items() if shape[1] % block_size]
    if wrong:
        raise ConfigError(
            f"qlora.block_size: got {block_size}, must divide the inputs of every linear layer: "
            f"{', '.join(wrong)}"
        )


def load_quantized(path: str | Path, qlora: QloraConfig, *, dtype: DType = dtypes.float32) -> Llama:
    """A Hugging Face LLaMA folder with its linear layers packed; dtype is that of activations.

    Raises ConfigError (a block size that does not fit), WeightsError (also for a value that 4
    bits cannot hold).
    """
    folder = open_folder(path)
    model = packed_linears(Llama(folder.config, dtype=dtype, seed=None), qlora.block_size)
    fill_packed(model, str(folder.path), lambda name: partial(_rows, folder, name), folder.forget)
    return model


def fill_packed(
    model: Llama,
    source: str,
    read: Callable[[str], Rows],
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Give a model of `packed_linears` its values, a tensor at a time, in the order of their names.

    read(name) is asked once for each tensor, and what it returns for its rows, some at a time on
    every thread; done(name) is called when it is packed. `source` begins errors (WeightsError).
    """
    tensors = model.state_dict()
    linears = {path: getattr(owner, n) for path, owner, n in block_linears(model.model.layers)}
    with ThreadPoolExecutor(device.threads()) as pool:
        for name, shape in llama_shapes(model.config).items():
            layer, label = linears.get(name.removesuffix(".weight")), f"{source}: {name}"
            if layer is None:
                fill = _store(label, tensors[name], read(name))
            else:
                fill = _quantize(label, layer, read(name))
            with fill as part:
                list(pool.map(part, _parts(shape)))
            done(name)


@contextmanager
def _quantize(label: str, layer: Int4Linear, read: Rows) -> Iterator[Callable[[slice], None]]:
    """What packs some rows of a tensor into a layer."""
    block_size = layer.in_features // layer.scales.shape[1]
    with filling(layer.packed) as packed, filling(layer.scales) as scales:

        def part(rows: slice) -> None:
            try:
                packed[rows], scales[rows] = quantize_rows(
                    to_float32(label, read(rows)), block_size
                )
            except ValueError as error:
                raise WeightsError(f"{label}: {error}") from error

        yield part


@contextmanager
def _store(label: str, tensor: Tensor, read: Rows) -> Iterator[Callable[[slice], None]]:
    """What copies some rows, rounded to the type of `tensor`."""
    stored = "BF16" if tensor.dtype == dtypes.bfloat16 else "F32"
    with filling(tensor) as values:

        def part(rows: slice) -> None:
            values[rows] = convert(label, read(rows), stored)

        yield part


def _parts(shape: Sequence[int]) -> list[slice]:
    """A tensor's rows in parts of about PART_ELEMENTS."""
    rows, *width = shape
    step = max(1, PART_ELEMENTS // math.prod(width))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _rows(folder: HfFolder, name: str, rows: slice) -> RawArray:
    values = folder.array(name)[rows]
    return RawArray(folder.dtype(name), values.shape, values)
