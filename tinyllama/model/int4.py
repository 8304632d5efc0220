"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), packed while read.

Groups of `block_size` neighbours of a row share a scale (formats/int4.py). Every linear layer of
the blocks is packed. The embedding and the head are held in bfloat16 and the norms in float32. A
checkpoint is read one tensor at a time, in groups of rows, so that loading needs little more memory
than the result.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from tinygrad import Tensor, dtypes

from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import (
    Array,
    RawArray,
    convert,
    to_float32,
)
from tinyllama.formats.huggingface import llama_shapes
from tinyllama.formats.int4 import check_block_size, quantize_rows, row_parts
from tinyllama.formats.models import ModelSource
from tinyllama.model.layers import Embedding, Linear, block_linears
from tinyllama.model.llama import Llama
from tinyllama.ops.int4 import dequantize, int4_linear
from tinyllama.runtime.storage import filling
from tinyllama.system import device

# Some rows of a tensor, as they are stored.
Rows = Callable[[slice], Array]


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
        self.block_size = block_size
        self.packed = Tensor.empty(out_features, in_features // 2, dtype=dtypes.uint8)
        self.scales = Tensor.empty(out_features, in_features // block_size, dtype=dtypes.float16)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return int4_linear(x, self.packed, self.scales)

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) float32 that this layer multiplies by, exactly."""
        return dequantize(self.packed, self.scales)


def is_packed(model: Llama) -> bool:
    """Whether a model without adapters has its linear layers in 4 bits."""
    layers = (getattr(owner, name) for _, owner, name in block_linears(model.model.layers))
    return any(isinstance(layer, Int4Linear) for layer in layers)


def packed_linears(model: Llama, block_size: int) -> Llama:
    """Make every linear layer of the blocks an Int4Linear, and embedding and head bfloat16.

    In place; no tensor has memory or values yet. Raises ConfigError.
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


def read_packed(model: Llama, folder: ModelSource) -> None:
    """Give a model of `packed_linears` the weights of a Hugging Face folder.

    Raises WeightsError (also for a value that 4 bits cannot hold).
    """
    fill_packed(model, str(folder.path), lambda name: partial(_rows, folder, name), folder.forget)


def fill_packed(
    model: Llama,
    source: str,
    read: Callable[[str], Rows],
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Give a model of `packed_linears` its values, one tensor at a time.

    read(name) is called once per tensor; the function it returns gives slices of rows and is called
    on several threads. done(name) is called when the tensor is packed. Errors (WeightsError) begin
    with `source`.
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
                list(pool.map(part, row_parts(shape)))
            done(name)


@contextmanager
def _quantize(label: str, layer: Int4Linear, read: Rows) -> Iterator[Callable[[slice], None]]:
    """Yield a function that packs some rows of a tensor into a layer."""
    with filling(layer.packed) as packed, filling(layer.scales) as scales:

        def part(rows: slice) -> None:
            try:
                packed[rows], scales[rows] = quantize_rows(
                    to_float32(label, read(rows)), layer.block_size
                )
            except ValueError as error:
                raise WeightsError(f"{label}: {error}") from error

        yield part


@contextmanager
def _store(label: str, tensor: Tensor, read: Rows) -> Iterator[Callable[[slice], None]]:
    """Yield a function that copies some rows, rounded to the type of `tensor`."""
    stored = "BF16" if tensor.dtype == dtypes.bfloat16 else "F32"
    with filling(tensor) as values:

        def part(rows: slice) -> None:
            values[rows] = convert(label, read(rows), stored)

        yield part


def _rows(folder: ModelSource, name: str, rows: slice) -> RawArray:
    values = folder.array(name)[rows]
    return RawArray(folder.dtype(name), values.shape, values)
