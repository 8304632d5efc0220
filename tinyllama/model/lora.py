"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen linear layer and a trained low-rank one.

    y = x W^T + scale (x A^T) B^T,  A [r, in] Kaiming-uniform, B [out, r] zero

`attach` wraps layers. With B = 0 the model computes what its base computes,
bit for bit. In training, dropout sets inputs of A to zero. Its mask is a function of the layer's
key, which is written before every micro-batch, so that a resumed run has the same masks.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes

from tinyllama.formats.peft import PARTS, AdapterConfig, AdapterFolder, save_adapter
from tinyllama.formats.safetensors import FileDigest
from tinyllama.model.layers import Linear, LinearLike, block_linears
from tinyllama.model.llama import Llama
from tinyllama.ops.random_bits import random_bits
from tinyllama.runtime import storage


class LoRALinear:
    """A linear layer and its adapter. The base's tensors keep their names (layers.WRAPPED)."""

    def __init__(self, base: LinearLike, rank: int, scale: float, dropout: float = 0.0) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.lora_A = Linear(base.in_features, rank)
        self.lora_B = Linear(rank, base.out_features)
        self.scale, self.dropout = scale, dropout
        self.drops = False  # only while training, see `dropping`
        self.is_on = True  # see `without_adapters`
        if dropout:
            self.dropout_key = Tensor.empty(2, dtype=dtypes.uint32)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if not self.is_on:
            return self.base(x)
        low = self.lora_A(self._thinned(x) if self.drops else x)  # (..., rank)
        return self.lora_B(low * self.scale, self.base(x))

    def dense_weight(self) -> Tensor:
        """W + scale B A, (out_features, in_features) float32."""
        delta = self.lora_B.weight @ self.lora_A.weight
        return self.base.dense_weight() + delta * self.scale

    def _thinned(self, x: Tensor) -> Tensor:
        """x with a fraction `dropout` set to zero, and the rest scaled up to keep the mean."""
        kept = random_bits(self.dropout_key, x.numel()) >= int(self.dropout * 2**32)
        return kept.reshape(x.shape).where(x * (1 / (1 - self.dropout)), 0).cast(x.dtype)


def attach(model: Llama, config: AdapterConfig, seed: int | None) -> None:
    """Wrap the layers that `config` names, with new adapters: A from the seed and name, B zero.

    With seed None the adapters have no memory and no values yet.
    """
    for path, owner, name in list(block_linears(model.model.layers)):
        if path not in config.placed:
            continue
        rank, scale = config.placed[path].rank, config.scale(path)
        layer = LoRALinear(getattr(owner, name), rank, scale, config.dropout)
        if seed is not None:
            first = _kaiming_uniform(layer.lora_A, f"{path}.lora_A", seed)
            storage.write(layer.lora_A.weight, first)
            storage.fill_zero(layer.lora_B.weight)
        setattr(owner, name, layer)


def read_adapters(model: Llama, adapter: AdapterFolder) -> None:
    """Overwrite every adapter of a model with that of a folder."""
    for path, layer in lora_layers(model).items():
        storage.write(layer.lora_A.weight, adapter.matrix(path, "lora_A"))
        storage.write(layer.lora_B.weight, adapter.matrix(path, "lora_B"))


def write_adapter(folder: Path, model: Llama, config: AdapterConfig) -> dict[str, FileDigest]:
    """Fill `folder` with a model's adapters as PEFT keeps them; returns the files' digests."""
    return save_adapter(
        folder,
        config,
        {name: partial(storage.read, t) for name, t in adapter_tensors(model).items()},
        layers=[path for path, _, _ in block_linears(model.model.layers)],
    )


def lora_layers(model: Llama) -> dict[str, LoRALinear]:
    """The wrapped layers by path."""
    layers = ((path, getattr(owner, n)) for path, owner, n in block_linears(model.model.layers))
    return {path: layer for path, layer in layers if isinstance(layer, LoRALinear)}


def adapter_tensors(model: Llama) -> dict[str, Tensor]:
    """A and B of every wrapped layer, by PATH.lora_A.weight and PATH.lora_B.weight."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        for part, linear in zip(PARTS, (layer.lora_A, layer.lora_B), strict=True):
            tensors[f"{path}.{part}.weight"] = linear.weight
    return tensors


Dropping = Callable[[int, int], AbstractContextManager[None]]


def dropping(model: Llama, seed: int) -> Dropping:
    """Dropout for a training step: `with dropping(step, micro_batch): forward and backward`."""
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.dropout}

    @contextmanager
    def masks(step: int, micro_batch: int) -> Iterator[None]:
        for path, layer in layers.items():
            entropy = [seed, zlib.crc32(path.encode()), step, micro_batch]
            key = np.random.SeedSequence(entropy).generate_state(2)
            storage.write(layer.dropout_key, key)
        with dropout_on(model):
            yield

    return masks


@contextmanager
def dropout_on(model: Llama) -> Iterator[None]:
    """Adapters apply their dropout within this block: in training, not in validation."""
    layers = [layer for layer in lora_layers(model).values() if layer.dropout]
    for layer in layers:
        layer.drops = True
    try:
        yield
    finally:
        for layer in layers:
            layer.drops = False


@contextmanager
def without_adapters(model: Llama) -> Iterator[None]:
    """The model computes what its frozen base computes within this block."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def _kaiming_uniform(layer: Linear, name: str, seed: int) -> np.ndarray:
    """Uniform in +-sqrt(6 / ((1 + a^2) in)) with a = sqrt(5) (He et al. 2015): +-1 / sqrt(in)."""
    key = np.random.SeedSequence([seed, zlib.crc32(f"{name}.weight".encode())])
    shape = (layer.out_features, layer.in_features)
    values = np.random.Generator(np.random.SFC64(key)).random(shape, dtype=np.float32)
    return (2 * values - 1) * np.float32(1 / math.sqrt(layer.in_features))
