"""The one way from a configuration to a model, its adapters and the tensors that are trained.

    layers     those of [model]; with [qlora] the linear layers are packed in 4 bits
    weights    new from the seed, or read from a folder
    adapters   those of [lora], new or read from a checkpoint
    trained    the adapters' matrices where there are any, or else every weight

Training, the memory estimate, the benchmark and loading differ only in where the weights come
from, so they call the functions below and nothing assembles a model by hand.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.config import Config, LlamaConfig, LoraConfig
from tinyllama.config.options import got, options_of, shown
from tinyllama.errors import ConfigError
from tinyllama.formats import hub
from tinyllama.formats.adapted import adapted
from tinyllama.formats.huggingface import llama_shapes
from tinyllama.formats.int4 import Packing
from tinyllama.formats.models import ModelSource, local_path, open_model
from tinyllama.formats.packed import random_rows
from tinyllama.formats.peft import (
    AdapterConfig,
    AdapterFolder,
    Placement,
    fingerprint,
    is_adapter,
    open_adapter,
)
from tinyllama.model import int4, lora
from tinyllama.model.initialize import first_values
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.model.noise import EmbeddingNoise
from tinyllama.ops import matmul
from tinyllama.system import device
from tinyllama.tokenizers.opening import holds_tokenizer


class Built(NamedTuple):
    """A model, the tensors that training changes (by name), and what its adapters are."""

    model: Llama
    trained: dict[str, Tensor]
    adapter: AdapterConfig | None


def build(config: Config, resume: Path | None = None) -> Built:
    """The model that a run trains: new, on `model.base`, or as the checkpoint `resume` has it.

    The sizes of a base must be in the configuration already (`prepare.with_base`). Raises
    ConfigError where a folder's sizes or adapters are not those of the configuration, and
    WeightsError.
    """
    seed = config.training.seed
    source = config.model.base if config.lora else resume or config.model.base
    if source is None:
        return _assemble(config, lambda model: model.initialize_later(seed), seed)
    folder = open_model(source)
    # An adapter's folder holds no sizes: its base's must be the ones it was trained with.
    if resume is not None or config.lora is not None:
        _check_sizes(config, folder.config, source)
    packing = _packing(config)
    built = _assemble(config, lambda model: _read(model, folder, packing), seed, folder)
    if built.adapter is None:
        return built
    adapter = replace(
        built.adapter,
        base=hub.name_of(folder.path) or str(folder.path.absolute()),
        base_fingerprint=fingerprint(folder),
        block_size=packing and packing.block_size,
        requantize=packing is not None and packing.requantize,
    )
    if resume is not None:
        _restore_adapters(built.model, adapter, resume, folder)
    return built._replace(adapter=adapter)


def build_blank(config: Config) -> Built:
    """The model that a configuration trains, its tensors without memory: for planning a run."""
    return _assemble(config, lambda model: None, None, _base(config))


def build_random(config: Config, seed: int) -> Built:
    """The model with random weights, also those of a base: what a step costs is the same."""

    def fill(model: Llama) -> None:
        if _packing(config) is None:
            model.initialize_later(seed)
        else:
            _fill_packed_at_random(model, seed)

    return _assemble(config, fill, seed, _base(config))


def load_model(
    folder: str | Path, *, base: str | Path | None = None, dtype: DType = dtypes.float32
) -> Llama:
    """The model of a folder or file, its matrices as they are stored; an adapter's is on its base,
    packed as in training.

    An adapter names its base; `base` is another place where that base is. Raises ConfigError and
    WeightsError.
    """
    folder = local_path(folder)
    if not is_adapter(folder):
        _refuse_base(folder, base)
        return _as_stored(open_model(folder), dtype)
    adapter, opened = open_adapter(folder, base)
    placed = adapter.config(opened.config)
    opened = adapted(opened, adapter, placed)
    packing = adapter.packing()
    if packing is None:
        model = _as_stored(opened, dtype)
    else:
        model = _layers(opened.config, dtype, packing, opened)
        int4.read_packed(model, opened)
    lora.attach(model, placed, None)
    lora.read_adapters(model, adapter)
    return model


def with_adapter(model: Llama, folder: Path, base: Path) -> Llama:
    """Another model: `model`, which was loaded from `base`, with an adapter. They share the base's
    weights, unless the adapter was trained on other forms of them.

    Raises ConfigError and WeightsError, for a folder that holds no adapter too.
    """
    if not is_adapter(folder):
        raise ConfigError(f"{folder}: holds no adapter (adapter_config.json)")
    adapter, opened = open_adapter(folder, base)
    placed = adapter.config(opened.config)
    if adapter.packing() is not None or adapted(opened, adapter, placed) is not opened:
        return load_model(folder, base=base, dtype=model.dtype)
    other = _sharing(model)
    lora.attach(other, placed, None)
    lora.read_adapters(other, adapter)
    return other


def _sharing(model: Llama) -> Llama:
    """Another model of the same tensors, whose layers can be wrapped."""
    other = copy(model)
    other.model = copy(model.model)
    other.model.layers = [copy(block) for block in model.model.layers]
    for block in other.model.layers:
        block.self_attn, block.mlp = copy(block.self_attn), copy(block.mlp)
    return other


def tokenizer_folder(folder: Path, base: str | Path | None = None) -> Path:
    """The folder that holds a model's tokenizer: PEFT's adapters have none of their own."""
    if is_adapter(folder) and not holds_tokenizer(folder):
        return AdapterFolder(folder).base_folder() if base is None else local_path(base)
    return folder


# ---- what all of them share


def _assemble(
    config: Config,
    fill: Callable[[Llama], None],
    seed: int | None,
    base: ModelSource | None = None,
) -> Built:
    """Layers, weights by `fill`, adapters from the seed (None: without memory).

    What a packed base holds in blocks decides the form of those layers.
    """
    dtype = getattr(dtypes, config.training.dtype)
    model = _layers(config.model, dtype, _packing(config), base)
    model.checkpoint_activations = config.training.checkpoint_activations
    model.float32_products = _float32_products(config)
    if config.training.neftune_alpha:
        model.noise = EmbeddingNoise(config.training.neftune_alpha)
    fill(model)
    if config.lora is None:
        return Built(model, model.state_dict(), None)
    adapter = _placed(config.lora, model)
    lora.attach(model, adapter, seed)
    return Built(model, lora.adapter_tensors(model), adapter)


def _float32_products(config: Config) -> str:
    """training.float32_products. Raises ConfigError where it would be slower than exact ones."""
    kind = config.training.float32_products
    if kind != "exact" and not matmul.offers_bfloat16x3():
        found = device.instruction_set() if Device.DEFAULT == "CPU" else Device.DEFAULT
        raise ConfigError(
            f'{config.where("training.float32_products")}: got "{kind}", must be "exact" on '
            f"{found}: only AMX makes such products faster"
        )
    return kind


def _packing(config: Config) -> Packing | None:
    """How [qlora] packs the base; None where nothing is packed."""
    qlora = config.qlora
    if qlora is None or not qlora.quantize_base:
        return None
    return Packing(qlora.block_size, qlora.requantize)


def _as_stored(source: ModelSource, dtype: DType) -> Llama:
    """A model with the weights of `source`, each matrix in the type that it is stored in."""
    model = int4.as_stored(Llama(source.config, dtype=dtype, seed=None), source)
    int4.read_packed(model, source)
    return model


def _base(config: Config) -> ModelSource | None:
    """The base, opened, where the form of its tensors decides the form of layers."""
    if _packing(config) is None or config.model.base is None:
        return None
    return open_model(config.model.base)


def _layers(
    sizes: LlamaConfig, dtype: DType, packing: Packing | None, base: ModelSource | None
) -> Llama:
    """A model without memory, its linear layers packed if `packing` says so."""
    model = Llama(sizes, dtype=dtype, seed=None)
    if packing is None:
        return model
    return int4.packed_linears(model, packing.block_size, packing.stored(base))


def _read(model: Llama, folder: ModelSource, packing: Packing | None) -> None:
    """Give a model without adapters the weights of a base, packing what the model packs."""
    if packing is None:
        model.read_weights(folder)
    else:
        int4.read_packed(model, folder)


def _fill_packed_at_random(model: Llama, seed: int) -> None:
    sizes, shapes = model.config, llama_shapes(model.config)
    packed = int4.packed_layers(model)
    with ThreadPoolExecutor(device.threads()) as pool:

        def read(name: str) -> int4.Rows:
            if name in packed and not packed[name].form.is_ours:
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                return random_rows(packed[name].form, shapes[name], rng).part
            values = first_values(name, shapes[name], sizes.num_layers, seed, pool)
            return values.__getitem__

        int4.fill_packed(model, "random weights", read)


def _placed(section: LoraConfig, model: Llama) -> AdapterConfig:
    """The adapters that a [lora] section places on a model."""
    paths = (path for path, _, name in block_linears(model.model.layers) if name in section.modules)
    placed = dict.fromkeys(paths, Placement(section.rank, section.alpha))
    return AdapterConfig(placed, section.use_rslora, section.dropout)


def _restore_adapters(
    model: Llama, adapter: AdapterConfig, checkpoint: Path, base: ModelSource
) -> None:
    """Read a checkpoint's adapters, which must be placed like `adapter` on the same base."""
    saved = AdapterFolder(checkpoint)
    saved.check_base(base)
    stored = saved.config(model.config)
    if (stored.placed, stored.use_rslora) != (adapter.placed, adapter.use_rslora):
        raise ConfigError(f"[lora] differs from {checkpoint}: {stored.summary()} is saved there")
    if (stored.block_size, stored.requantize) != (adapter.block_size, adapter.requantize):
        raise ConfigError(
            f"[qlora] differs from {checkpoint}: it was trained on {_base_form(stored)}, and this "
            f"configuration has {_base_form(adapter)}"
        )
    lora.read_adapters(model, saved)


def _base_form(adapter: AdapterConfig) -> str:
    if adapter.block_size is None:
        return "a base that is not packed"
    requantized = ", requantized" if adapter.requantize else ""
    return f"a base in 4 bits with block_size {adapter.block_size}{requantized}"


def _check_sizes(config: Config, saved: LlamaConfig, source: str | Path) -> None:
    """Raise ConfigError if the sizes in a folder are not those of [model]."""
    sizes, file = config.model, f"{source}/config.json"
    mine, theirs = (
        asdict(replace(c, num_kv_heads=c.kv_heads, rope_scaling=c.scaling)) for c in (sizes, saved)
    )
    keys = {option.name: option.key for option in options_of("model", LlamaConfig)}
    theirs |= {"base": sizes.base, "max_seq_len": sizes.max_seq_len}
    problems = [
        f"{config.where(keys[name])}: {got(mine[name], f'{shown(value)} as in {file}')}"
        for name, value in theirs.items()
        if mine[name] != value
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _refuse_base(folder: str | Path, base: str | Path | None) -> None:
    if base is not None:
        raise ConfigError(
            f"--base: got {base}, must be left out: {folder} holds a whole model, not an adapter"
        )
