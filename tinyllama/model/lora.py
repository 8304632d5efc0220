"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen linear layer and a trained low-rank one.

    y = x W^T + scale (x A^T) B^T,  A [r, in] Kaiming-uniform, B [out, r] zero

`attach` wraps layers, `fuse` is its inverse. With B = 0 the model computes what its base computes,
bit for bit. Dropout zeroes inputs of A in training; its mask is a function of the layer's key,
which is rewritten before every micro-batch, so that a resumed run sees the same masks.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.config import LoraConfig, QloraConfig
from tinyllama.errors import ConfigError
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.peft import (
    PARTS,
    AdapterConfig,
    AdapterFolder,
    Placement,
    fingerprint,
    is_adapter,
    open_adapter,
    save_adapter,
)
from tinyllama.formats.safetensors import FileDigest
from tinyllama.model.int4 import block_size_of, load_quantized
from tinyllama.model.layers import (
    Linear,
    LinearLike,
    block_linears,
    named_tensors,
)
from tinyllama.model.llama import Llama
from tinyllama.runtime import storage
from tinyllama.tokenizers.sentencepiece import MODEL_FILE


class LoRALinear:
    """A linear layer and its adapter. The base's tensors keep their names (layers.WRAPPED)."""

    def __init__(self, base: LinearLike, rank: int, scale: float, dropout: float = 0.0) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.lora_A = Linear(base.in_features, rank)
        self.lora_B = Linear(rank, base.out_features)
        self.scale, self.dropout = scale, dropout
        self.drops = False  # only while training, see `dropping`
        if dropout:
            self.dropout_key = Tensor.empty(2, dtype=dtypes.uint32)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        low = self.lora_A(self._thinned(x) if self.drops else x)  # (..., rank)
        return self.lora_B(low * self.scale, self.base(x))

    def dense_weight(self) -> Tensor:
        """W + scale B A, (out_features, in_features) float32."""
        delta = self.lora_B.weight @ self.lora_A.weight
        return self.base.dense_weight() + delta * self.scale

    def _thinned(self, x: Tensor) -> Tensor:
        """x with a share `dropout` of it zero, and the rest scaled up to keep its mean."""
        kept = random_bits(self.dropout_key, x.numel()) >= int(self.dropout * 2**32)
        return kept.reshape(x.shape).where(x * (1 / (1 - self.dropout)), 0).cast(x.dtype)


def random_bits(key: Tensor, count: int) -> Tensor:
    """`count` uint32 that are a hash of their index and the key (2,) uint32.

    Two rounds of the finalizer of MurmurHash3 (Appleby, public domain), a key word before each.
    """
    bits = Tensor.arange(count, dtype=dtypes.uint32, device=key.device)
    for word in (0, 1):
        bits = bits ^ key[word]
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
    return bits


def start(
    model: Llama, lora: LoraConfig, base: Path, seed: int, resume: Path | None
) -> AdapterConfig:
    """Give a model, loaded from the folder `base`, the adapters that a [lora] section asks for.

    They are new, or those of the checkpoint `resume`: ConfigError if that has others than asked,
    WeightsError if it was made for another base.
    """
    placement = Placement(lora.rank, lora.alpha)
    paths = (path for path, _, name in block_linears(model.model.layers) if name in lora.modules)
    placed = dict.fromkeys(paths, placement)
    opened = open_folder(base)
    config = AdapterConfig(
        placed,
        lora.use_rslora,
        lora.dropout,
        str(base.absolute()),
        fingerprint(opened),
        block_size_of(model),
    )
    attach(model, config, seed)
    if resume is not None:
        saved = AdapterFolder(resume)
        saved.check_base(opened)
        found = saved.config(model.config)
        if (found.placed, found.use_rslora) != (config.placed, config.use_rslora):
            raise ConfigError(f"[lora] differs from {resume}: {found.summary()} is saved there")
        if found.block_size != config.block_size:
            raise ConfigError(
                f"[qlora] differs from {resume}: {_base_form(found)} was trained on there, "
                f"{_base_form(config)} is asked for"
            )
        read_adapters(model, saved)
    return config


def _base_form(config: AdapterConfig) -> str:
    if config.block_size is None:
        return "a base that is not packed"
    return f"a base in 4 bits, block_size {config.block_size},"


def attach(model: Llama, config: AdapterConfig, seed: int) -> None:
    """Wrap the layers that `config` names, with new adapters: A from the seed and name, B zero."""
    for path, owner, name in list(block_linears(model.model.layers)):
        if path not in config.placed:
            continue
        rank, scale = config.placed[path].rank, config.scale(path)
        layer = LoRALinear(getattr(owner, name), rank, scale, config.dropout)
        storage.write(layer.lora_A.weight, _kaiming_uniform(layer.lora_A, f"{path}.lora_A", seed))
        storage.fill_zero(layer.lora_B.weight)
        setattr(owner, name, layer)


def load_adapter(model: Llama, folder: str | Path) -> AdapterConfig:
    """Wrap a base's layers with the adapters of a PEFT folder. Raises ConfigError, WeightsError."""
    adapter = AdapterFolder(folder)
    config = adapter.config(model.config)
    attach(model, config, seed=0)
    read_adapters(model, adapter)
    return config


def read_adapters(model: Llama, adapter: AdapterFolder) -> None:
    """Overwrite every adapter of a model by that of a folder."""
    for path, layer in lora_layers(model).items():
        storage.write(layer.lora_A.weight, adapter.matrix(path, "lora_A"))
        storage.write(layer.lora_B.weight, adapter.matrix(path, "lora_B"))


def load_model(folder: str | Path, *, dtype: DType = dtypes.float32) -> Llama:
    """A model folder, or an adapter's on the base that it names, packed if it was in training."""
    if not is_adapter(folder):
        return Llama.from_pretrained(folder, dtype=dtype)
    adapter, base = open_adapter(folder)
    block_size = adapter.block_size()
    if block_size is None:
        model = Llama.from_pretrained(base.path, dtype=dtype)
    else:
        model = load_quantized(base.path, QloraConfig(block_size=block_size), dtype=dtype)
    load_adapter(model, folder)
    return model


def tokenizer_folder(folder: Path) -> Path:
    """Where a model's tokenizer is: PEFT's adapters have none of their own."""
    if is_adapter(folder) and not (folder / MODEL_FILE).is_file():
        return AdapterFolder(folder).base_folder()
    return folder


def write_adapter(folder: Path, model: Llama, config: AdapterConfig) -> dict[str, FileDigest]:
    """Fill `folder` with a model's adapters as PEFT keeps them; returns the files' digests."""
    return save_adapter(
        folder,
        config,
        {name: partial(storage.read, t) for name, t in adapter_tensors(model).items()},
        layers=[path for path, _, _ in block_linears(model.model.layers)],
    )


def fuse(model: Llama) -> None:
    """Replace every wrapped layer by a plain one with the weight W + scale B A."""
    for _, owner, name in list(block_linears(model.model.layers)):
        layer = getattr(owner, name)
        if isinstance(layer, LoRALinear):
            plain = Linear(layer.in_features, layer.out_features)
            plain.weight = layer.dense_weight().contiguous().realize()
            setattr(owner, name, plain)


def lora_layers(model: Llama) -> dict[str, LoRALinear]:
    """The wrapped layers by path."""
    layers = ((path, getattr(owner, n)) for path, owner, n in block_linears(model.model.layers))
    return {path: layer for path, layer in layers if isinstance(layer, LoRALinear)}


def adapter_tensors(model: Llama) -> dict[str, Tensor]:
    """A and B of every wrapped layer, by PATH.lora_A.weight and PATH.lora_B.weight."""
    found = {}
    for path, layer in lora_layers(model).items():
        for part, linear in zip(PARTS, (layer.lora_A, layer.lora_B), strict=True):
            found[f"{path}.{part}.weight"] = linear.weight
    return found


def base_tensors(model: Llama) -> dict[str, Tensor]:
    """The frozen tensors by the names they have without adapters."""
    own = {f"{path}.dropout_key" for path in lora_layers(model)} | adapter_tensors(model).keys()
    return {name: tensor for name, tensor in named_tensors(model) if name not in own}


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
        _switch(layers, True)
        try:
            yield
        finally:
            _switch(layers, False)

    return masks


def _switch(layers: Mapping[str, LoRALinear], drops: bool) -> None:
    for layer in layers.values():
        layer.drops = drops


def _kaiming_uniform(layer: Linear, name: str, seed: int) -> np.ndarray:
    """Uniform in +-sqrt(6 / ((1 + a^2) in)) with a = sqrt(5) (He et al. 2015): +-1 / sqrt(in)."""
    key = np.random.SeedSequence([seed, zlib.crc32(f"{name}.weight".encode())])
    shape = (layer.out_features, layer.in_features)
    values = np.random.Generator(np.random.SFC64(key)).random(shape, dtype=np.float32)
    return (2 * values - 1) * np.float32(1 / math.sqrt(layer.in_features))
