"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), packed while read.

Groups of `block_size` neighbours of a row share a scale (formats/int4.py). Every linear layer of
the blocks is packed; what a GGUF file holds in blocks of 4 or 8 bits stays as it is. The embedding
and the head are held in bfloat16 and the norms in float32. A checkpoint is read one tensor at a
time, in groups of rows, so that loading needs little more memory than the result.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import (
    Array,
    convert,
    to_float32,
)
from tinyllama.formats.huggingface import EMBEDDING, HEAD, llama_shapes
from tinyllama.formats.int4 import check_block_size, quantize_rows, row_parts
from tinyllama.formats.models import ModelSource
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.model.layers import (
    Embedding,
    Linear,
    LinearLike,
    TableLike,
    block_linears,
    with_bias,
)
from tinyllama.model.llama import Llama
from tinyllama.ops.int4 import dequantize, int4_embedding, int4_linear
from tinyllama.runtime.storage import filling
from tinyllama.system import device

# Some rows of a tensor, as they are stored.
Rows = Callable[[slice], Array | PackedRows]


class Int4Linear:
    """y = x W^T, or x W^T + b, with W in 4 or 8 bits and without a gradient of W and b.

    packed, scales and minima (None without them) as ops/int4.py reads them; bias: (out_features,)
    float32 or None. Raises ConfigError if the block size does not divide in_features.
    """

    def __init__(
        self, in_features: int, out_features: int, form: PackedForm, *, bias: bool = False
    ) -> None:
        if in_features % form.block_size or form.block_size % 2:
            raise ConfigError(
                f"qlora.block_size: got {form.block_size}, must be an even divisor of "
                f"{in_features}, the inputs of a linear layer"
            )
        self.in_features, self.out_features, self.form = in_features, out_features, form
        width, q = in_features * form.bits // 8, dtypes.uint8 if form.bits == 4 else dtypes.int8
        groups = (out_features, in_features // form.block_size)
        self.packed = Tensor.empty(out_features, width, dtype=q)
        self.scales = Tensor.empty(*groups, dtype=dtypes.float16)
        self.minima = Tensor.empty(*groups, dtype=dtypes.float16) if form.minima else None
        self.bias = Tensor.empty(out_features) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return with_bias(int4_linear(x, self.packed, self.scales, self.minima), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) float32 that this layer multiplies by, exactly."""
        return dequantize(self.packed, self.scales, self.minima)


class Int4Embedding:
    """Rows of a packed table, which is the output head as well where that is tied."""

    def __init__(self, vocab_size: int, hidden_size: int, form: PackedForm) -> None:
        self.table = Int4Linear(hidden_size, vocab_size, form)

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor:
        """ids (B, T) int32 -> (B, T, hidden_size) of type `dtype`."""
        t = self.table
        return int4_embedding(ids, t.packed, t.scales, t.minima, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) times the table, transposed -> (..., vocab_size) like x."""
        return self.table(x)

    def dense_weight(self) -> Tensor:
        """The table (vocab_size, hidden_size) float32, exactly."""
        return self.table.dense_weight()


def as_stored(model: Llama, source: ModelSource) -> Llama:
    """Make every matrix of the model hold exactly what `source` stores, in no more memory.

    Blocks that layers multiply by stay packed, bfloat16 and float16 stay as they are, and other
    types are widened to float32. In place; no tensor has memory or values yet.
    """
    for path, owner, name in list(block_linears(model.model.layers)):
        setattr(owner, name, _stored_linear(getattr(owner, name), source, f"{path}.weight"))
    if not model.config.tie_word_embeddings:
        model.lm_head = _stored_linear(model.lm_head, source, HEAD)
    form, table = source.packed_form(EMBEDDING), model.model.embed_tokens
    vocab_size, hidden_size = source.shape(EMBEDDING)
    if form is None:
        table = Embedding(vocab_size, hidden_size)
        table.weight = _stored_tensor(source, EMBEDDING)
        model.model.embed_tokens = table
    else:
        model.model.embed_tokens = Int4Embedding(vocab_size, hidden_size, form)
    return model


def widen_head(model: Llama) -> None:
    """Hold the output matrix in float32 if it is packed: the loss is computed from a dense one."""
    name = EMBEDDING if model.config.tie_word_embeddings else HEAD
    layer = packed_layers(model).get(name)
    if layer is None:
        return
    weight = layer.dense_weight().contiguous().realize()
    table = Embedding(*weight.shape) if name == EMBEDDING else Linear(*weight.shape[::-1])
    table.weight = weight
    if isinstance(table, Embedding):
        model.model.embed_tokens = table
    else:
        model.lm_head = table


def _stored_linear(layer: LinearLike, source: ModelSource, name: str) -> LinearLike:
    assert isinstance(layer, Linear)
    form, bias = source.packed_form(name), layer.bias is not None
    if form is not None:
        return Int4Linear(layer.in_features, layer.out_features, form, bias=bias)
    layer.weight = _stored_tensor(source, name)
    return layer


def _stored_tensor(source: ModelSource, name: str) -> Tensor:
    types = {"BF16": dtypes.bfloat16, "F16": dtypes.float16, "F32": dtypes.float32}
    return Tensor.empty(*source.shape(name), dtype=types[source.dtype(name)])


def packed_linears(
    model: Llama, block_size: int, stored: Mapping[str, PackedForm | None] | None = None
) -> Llama:
    """Make every linear layer of the blocks an Int4Linear, and embedding and head bfloat16.

    Layers whose paths are in `stored` get that form, or stay dense where it is None: in bfloat16
    where the activations are, else in float32. In place; no tensor has memory or values yet. Raises
    ConfigError.
    """
    stored = stored or {}
    check_block_size(model.config, block_size, stored)
    narrow: list[TableLike | LinearLike] = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        narrow.append(model.lm_head)
    for path, owner, name in list(block_linears(model.model.layers)):
        layer, form = getattr(owner, name), stored.get(path, PackedForm(4, block_size))
        if form is not None:
            sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
            setattr(owner, name, Int4Linear(*sizes, form, bias=bias))
        elif model.dtype == dtypes.bfloat16:
            narrow.append(layer)
    for table in narrow:
        assert isinstance(table, Embedding | Linear)
        table.weight = Tensor.empty(*table.weight.shape, dtype=dtypes.bfloat16)
    return model


def read_packed(model: Llama, source: ModelSource) -> None:
    """Give a model of `packed_linears` or `as_stored` the weights of an opened model.

    Raises WeightsError (also for a value that 4 bits cannot hold).
    """
    packed = packed_layers(model)
    model.remember(source)

    def read(name: str) -> Rows:
        form = source.packed_form(name)
        return partial(source.packed if form and name in packed else source.rows, name)

    fill_packed(model, str(source.path), read, source.forget)


def packed_layers(model: Llama) -> dict[str, Int4Linear]:
    """The packed matrices of a model without adapters, by their names in Hugging Face's folders."""
    layers: dict[str, Any] = {EMBEDDING: getattr(model.model.embed_tokens, "table", None)}
    layers |= {} if model.config.tie_word_embeddings else {HEAD: model.lm_head}
    for path, owner, name in block_linears(model.model.layers):
        layers[f"{path}.weight"] = getattr(owner, name)
    return {name: layer for name, layer in layers.items() if isinstance(layer, Int4Linear)}


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
    tensors, packed = model.state_dict(), packed_layers(model)
    with ThreadPoolExecutor(device.threads()) as pool:
        for name, shape in llama_shapes(model.config).items():
            label = f"{source}: {name}"
            if name in packed:
                fill = _pack(label, packed[name], read(name))
            else:
                fill = _store(label, tensors[name], read(name))
            with fill as part:
                list(pool.map(part, row_parts(shape)))
            done(name)


@contextmanager
def _pack(label: str, layer: Int4Linear, read: Rows) -> Iterator[Callable[[slice], None]]:
    """Yield a function that packs some rows of a tensor into a layer."""
    with ExitStack() as memories:
        packed = memories.enter_context(filling(layer.packed))
        scales = memories.enter_context(filling(layer.scales))
        minima = None
        if layer.minima is not None:
            minima = memories.enter_context(filling(layer.minima))

        def part(rows: slice) -> None:
            values = read(rows)
            if not isinstance(values, PackedRows):
                values = _quantized(label, values, layer.form.block_size)
            packed[rows], scales[rows] = values.packed, values.scales
            if minima is not None:
                minima[rows] = values.minima

        yield part


def _quantized(label: str, rows: Array, block_size: int) -> PackedRows:
    try:
        return PackedRows(*quantize_rows(to_float32(label, rows), block_size), None)
    except ValueError as error:
        raise WeightsError(f"{label}: {error}") from error


@contextmanager
def _store(label: str, tensor: Tensor, read: Rows) -> Iterator[Callable[[slice], None]]:
    """Yield a function that copies some rows, rounded to the type of `tensor`."""
    stored = {dtypes.bfloat16: "BF16", dtypes.float16: "F16"}.get(tensor.dtype, "F32")
    with filling(tensor) as values:

        def part(rows: slice) -> None:
            part = read(rows)
            assert not isinstance(part, PackedRows)
            values[rows] = convert(label, part, stored)

        yield part
