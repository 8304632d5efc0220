"""The building blocks of the model, and walking and replacing them by path.

Every linear layer, plain or wrapped, has `in_features`, `out_features`, `__call__(x)` and
`dense_weight()`; llama.py uses nothing else of it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from tinygrad import Tensor
from tinygrad.dtype import DType

from tinyllama.config import ALL_LINEAR
from tinyllama.ops.embedding import embedding
from tinyllama.ops.matmul import linear
from tinyllama.ops.rms_norm import rms_norm

# The attribute in which a wrapping layer holds the inner one, whose tensors keep their names.
WRAPPED = "base"


class LinearLike(Protocol):
    """What the model needs of a linear layer."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...

    def dense_weight(self) -> Tensor: ...


class TableLike(Protocol):
    """What the model needs of its embedding; a tied one is the output head as well."""

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...

    def dense_weight(self) -> Tensor: ...


class Linear:
    """y = x W^T, or x W^T + b. weight: (out_features, in_features), bias: (out_features,), both
    float32."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weight = Tensor.empty(out_features, in_features)
        self.bias = Tensor.empty(out_features) if bias else None

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features), plus an `addend` like the result."""
        return with_bias(linear(x, self.weight, addend), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features) this layer multiplies by."""
        return self.weight


def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """out (..., out_features) + bias (out_features,), where there is one, in the type of out."""
    return out if bias is None else out + bias.cast(out.dtype)


class Embedding:
    """Rows of a table. weight: (vocab_size, hidden_size) float32."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        self.weight = Tensor.empty(vocab_size, hidden_size)

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor:
        """ids (B, T) int32 -> (B, T, hidden_size) of type `dtype`."""
        return embedding(ids, self.weight, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) times the table, transposed -> (..., vocab_size) like x."""
        return linear(x, self.weight)

    def dense_weight(self) -> Tensor:
        """The table (vocab_size, hidden_size)."""
        return self.weight


class RMSNorm:
    """x / rms(x) * weight. weight: (hidden_size,) float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        self.eps = eps
        self.weight = Tensor.empty(hidden_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> like x."""
        return rms_norm(x, self.weight, self.eps)


def named_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor below `module` with its path, in the order the attributes were made."""
    children = enumerate(module) if isinstance(module, list) else vars(module).items()
    for name, child in children:
        path = f"{prefix}{name}"
        if isinstance(child, Tensor):
            yield path, child
        elif name == WRAPPED and hasattr(child, "__dict__"):
            yield from named_tensors(child, prefix)
        elif isinstance(child, list) or hasattr(child, "__dict__"):
            yield from named_tensors(child, f"{path}.")


def structure(module: Any) -> tuple[tuple[str, object], ...]:
    """The paths of a module's tensors and its other attributes, such as an adapter's scale.

    Modules of equal structure compute the same function of their tensors.
    """
    entries: list[tuple[str, object]] = []
    children = enumerate(module) if isinstance(module, list) else vars(module).items()
    for name, child in children:
        if isinstance(child, Tensor):
            entries.append((str(name), Tensor))
        elif isinstance(child, list) or hasattr(child, "__dict__"):
            entries.append((str(name), structure(child)))
        else:
            entries.append((str(name), child))
    return tuple(entries)


def block_linears(layers: Iterable[Any]) -> Iterator[tuple[str, Any, str]]:
    """(path, owner, attribute) of every linear layer of a model's blocks, wrapped or not.

    Setting `owner.attribute` replaces the layer, whose tensors' names begin with the path.
    """
    for number, block in enumerate(layers):
        for part, owner in (("self_attn", block.self_attn), ("mlp", block.mlp)):
            for name in ALL_LINEAR:
                if name in vars(owner):
                    yield f"model.layers.{number}.{part}.{name}", owner, name
