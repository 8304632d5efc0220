"""Adapters for other programs: PEFT's folder, llama.cpp's LoRA, mlx-lm's folder, or merged.

llama.cpp multiplies B A by alpha / rank, mlx-lm by one scale; what a layer's own scale is beyond
that is written into B. The base of a QLoRA run can be written beside its adapter in the very form
that it was trained on, so that what was trained is what runs.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tinyllama.convert.check import Matrix, Read, compare
from tinyllama.convert.export_model import (
    MODEL_GGUF,
    Exported,
    Job,
    Model,
    Place,
    check_room,
    common_float,
    finished,
    rounding,
    text_of,
    write_gguf_model,
    write_model,
    write_modelfile,
)
from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError
from tinyllama.formats import mlx
from tinyllama.formats.adapted import adapted
from tinyllama.formats.dtypes import FLOATS, RawArray, convert
from tinyllama.formats.gguf import SUFFIX, GgufFile
from tinyllama.formats.gguf_writer import (
    adapter_fields,
    adapter_tensors,
    as_trained_problem,
    read_adapter,
    write_gguf,
)
from tinyllama.formats.huggingface import EMBEDDING, HEAD, linear_shapes_by_path, llama_shapes
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import (
    PARTS,
    AdapterConfig,
    AdapterFolder,
    open_adapter,
    save_adapter,
)

ADAPTER_GGUF = f"adapter{SUFFIX}"

Low = Callable[[str], tuple[Matrix, Matrix, float]]


@dataclass(frozen=True)
class Adapter:
    """An adapter on its base, in the form that it was trained on."""

    folder: AdapterFolder
    config: AdapterConfig
    base: Model

    def low(self, path: str) -> tuple[Matrix, Matrix, float]:
        """A (r, in), B (out, r) and scale of a layer."""
        a, b = (self.folder.matrix(path, part) for part in PARTS)
        return a, b, self.config.scale(path)

    def read(self, name: str) -> Matrix:
        """A tensor of the model that base and adapter are together."""
        return _with_low(self.config, self.base.read, self.low, name)


def _with_low(
    config: AdapterConfig,
    read: Read,
    low: Low,
    name: str,
) -> Matrix:
    path = name.removesuffix(".weight")
    if path not in config.placed or not name.endswith(".weight"):
        return read(name)
    a, b, scale = low(path)
    delta = np.matmul(b * np.float32(scale), a, dtype=np.float32)
    merged: Matrix = read(name) + delta
    return merged


def write_adapter(job: Job, place: Place) -> Exported:
    """Write the adapter that the source is: alone, with its base, or merged with it."""
    folder, base = open_adapter(job.source, job.base)
    config = folder.config(base.config)
    layers = linear_shapes_by_path(base.config)
    low = {path: each for path, each in config.placed.items() if path in layers}
    beyond = sorted({*config.saved, *(config.placed.keys() - low.keys())})
    if beyond and not job.merged:
        raise ConfigError(
            f"{job.source}: changes {', '.join(beyond)}, and an adapter alone holds nothing but "
            "low-rank matrices of linear layers: type --merged"
        )
    changed = adapted(base, folder, config)  # beyond the layers
    model = Model(changed, text_of(job.source, base), folder.packing())
    adapter = Adapter(folder, replace(config, placed=low), model)
    return _write_merged(job, place, adapter) if job.merged else _write_low(job, place, adapter)


def _write_merged(job: Job, place: Place, adapter: Adapter) -> Exported:
    """Write base and adapter as one model, by way of a merged folder in float32."""
    base, shapes = adapter.base.source, llama_shapes(adapter.base.config)
    check_room(place.folder, 4 * sum(map(math.prod, shapes.values())))
    merged = place.folder / "merged"  # removed before the place gets its name
    dtype = job.dtype or common_float([base.dtype(name) for name in shapes])
    # Of a base in 4 bits, the tables are bfloat16 before or after an adapter changes them.
    tables = () if adapter.base.packing is None else (EMBEDDING, HEAD)
    try:
        merge(base.path, [(adapter.folder.path, 1.0)], merged, dtype="fp32")
        model = Model(open_model(merged), adapter.base.text)
        return write_model(replace(job, dtype=dtype), place, model, adapter.read, tables)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _write_low(job: Job, place: Place, adapter: Adapter) -> Exported:
    """Write an adapter in its target's form, with its base beside it if that is chosen."""
    kind = job.dtype if job.dtype in FLOATS and not job.with_base else "F32"
    assert kind is not None
    model = adapter.base
    back: Read = model.read
    kinds: dict[str, str] = {}
    if job.with_base:
        path = place.folder / MODEL_GGUF
        _check_block_size(job, model)
        kinds = write_gguf_model(path, job, model)
        back = Model(GgufFile(path), model.text).read
    writers = {"gguf": _write_lora_gguf, "mlx": _write_lora_mlx, "hf": _write_lora_peft}
    low = writers[job.target](job, place, adapter, kind)
    check = compare(
        (model.config, adapter.read),
        (model.config, partial(_with_low, adapter.config, back, low)),
        lambda name: rounding(model, kinds, name) if job.with_base else kind,
        model.text.sample(model.config),
        str(job.out),
    )
    return finished(job, place, kind, check, [])


def _check_block_size(job: Job, model: Model) -> None:
    """Raise ConfigError if layers that a QLoRA run packed cannot be written exactly."""
    if model.packing is None or not any(map(model.is_rounded, _layers(model))):
        return
    if problem := as_trained_problem(model.packing.block_size):
        raise ConfigError(f"{job.source}: {problem}: type --merged instead")


def _layers(model: Model) -> list[str]:
    """Names of the weights of linear layers."""
    return [f"{path}.weight" for path in linear_shapes_by_path(model.config)]


def _write_lora_gguf(job: Job, place: Place, adapter: Adapter, kind: str) -> Low:
    config, path = adapter.base.config, place.gguf(ADAPTER_GGUF)
    shapes = linear_shapes_by_path(config)
    placed = {
        name: (each.rank, shapes[name][1], shapes[name][0])
        for name, each in adapter.config.placed.items()
    }
    alphas = [
        adapter.config.scale(name) * each.rank for name, each in adapter.config.placed.items()
    ]
    alpha = max(alphas, key=alphas.count)
    tensors = adapter_tensors(config, placed, alpha, adapter.low, kind)
    check_room(place.folder, sum(tensor.size_bytes for tensor in tensors.values()))
    write_gguf(path, adapter_fields(job.out.stem, alpha), tensors)
    write_modelfile(place, adapter.base, MODEL_GGUF if job.with_base else None, path.name)
    return read_adapter(path, config)


def _write_lora_mlx(job: Job, place: Place, adapter: Adapter, kind: str) -> Low:
    config = adapter.base.config
    shapes = {path: (out, into) for path, (out, into) in linear_shapes_by_path(config).items()}
    mlx.write_adapter(place.folder, adapter.config, shapes, adapter.low, config.num_layers, kind)
    return mlx.adapter_loader(place.folder)


def _write_lora_peft(job: Job, place: Place, adapter: Adapter, kind: str) -> Low:
    tensors = {
        f"{path}.{part}.weight": partial(_rounded, adapter.folder, path, part, kind)
        for path in adapter.config.placed
        for part in PARTS
    }
    layers = linear_shapes_by_path(adapter.base.config)
    save_adapter(place.folder, adapter.config, tensors, layers=layers)
    for name, data in adapter.base.text.files.items():
        (place.folder / name).write_bytes(data)
    written = AdapterFolder(place.folder)
    return Adapter(written, written.config(adapter.base.config), adapter.base).low


def _rounded(folder: AdapterFolder, path: str, part: str, kind: str) -> RawArray:
    values = folder.matrix(path, part)
    return RawArray(kind, values.shape, convert(f"{path}.{part}", values, kind))
