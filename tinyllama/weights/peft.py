"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

    base_model.model.PATH.lora_A.weight [r, in],  base_model.model.PATH.lora_B.weight [out, r]
    W + scale B A,  scale = alpha / r, or alpha / sqrt(r) with use_rslora

What the first file may say is in peft_config.py. A folder written here also carries, in the second
file's metadata, a fingerprint of its base, so that another base of the same sizes is told apart,
and the block size of a base that was packed in 4 bits (QLoRA): the adapters belong to what that
base is in 4 bits.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllama.config import ALL_LINEAR, LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.weights.dtypes import FLOATS
from tinyllama.weights.hf_config import read_json
from tinyllama.weights.hf_names import Shape, llama_shapes
from tinyllama.weights.hf_read import HfFolder, open_folder
from tinyllama.weights.peft_config import (
    ADAPTER_CONFIG,
    AdapterConfig,
    Placement,
    placement,
    targets,
    to_peft,
    unsupported,
)
from tinyllama.weights.safetensors import (
    FileDigest,
    SafetensorsFile,
    Source,
    write_safetensors,
)

__all__ = [
    "PARTS",
    "AdapterConfig",
    "AdapterFolder",
    "Placement",
    "fingerprint",
    "is_adapter",
    "linear_shapes",
    "open_adapter",
    "save_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B")

_PREFIX = "base_model.model."
_FINGERPRINT = "base_fingerprint"
_BLOCK_SIZE = "base_int4_block_size"
_SAMPLE_ELEMENTS = 1024


class AdapterFolder:
    """An adapter's folder, opened: its configuration checked, its matrices read when asked for."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ConfigError (adapter_config.json) and WeightsError (no safetensors file)."""
        self.path = Path(folder)
        self._found = read_json(self.path / ADAPTER_CONFIG)
        if problems := list(unsupported(self._found)):
            source = self.path / ADAPTER_CONFIG
            raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
        if not (self.path / ADAPTER_WEIGHTS).is_file():
            raise WeightsError(f"{self.path}: holds no {ADAPTER_WEIGHTS}")
        self._file = SafetensorsFile(self.path / ADAPTER_WEIGHTS)

    def base_folder(self) -> Path:
        """The base that base_model_name_or_path names, from here or from the adapter's folder."""
        if path := self._named_folder():
            return path
        raise WeightsError(
            f"{self.path / ADAPTER_CONFIG}: base_model_name_or_path: got "
            f"{self._found.get('base_model_name_or_path')!r}, must be the folder of the base model"
        )

    def _named_folder(self) -> Path | None:
        named = self._found.get("base_model_name_or_path")
        paths = (Path(str(named)), self.path / str(named)) if named else ()
        return next((path for path in paths if path.is_dir()), None)

    def config(self, model: LlamaConfig) -> AdapterConfig:
        """The adapters on a model of these sizes.

        Raises WeightsError that names every tensor that is missing, extra, misshapen (a rank that
        is not the configuration's) or not floating, and ConfigError.
        """
        shapes = linear_shapes(model)
        chosen = (path for path in shapes if targets(self._found, path))
        placed = {path: placement(self._found, path) for path in chosen}
        if not placed:
            raise ConfigError(
                f"{self.path / ADAPTER_CONFIG}: target_modules: got "
                f"{self._found.get('target_modules')!r}, must name linear layers of the model"
            )
        self._check_tensors(placed, shapes)
        base = self._found.get("base_model_name_or_path")
        dropout = float(self._found.get("lora_dropout") or 0.0)
        rslora, made_for = bool(self._found.get("use_rslora")), self._file.metadata
        return AdapterConfig(
            placed, rslora, dropout, base, made_for.get(_FINGERPRINT), self.block_size()
        )

    def block_size(self) -> int | None:
        """Of the base in 4 bits that the adapters were trained on; None if it was not packed."""
        text = self._file.metadata.get(_BLOCK_SIZE)
        if text is not None and not (text.isdecimal() and int(text) > 0):
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: {_BLOCK_SIZE}: got {text!r}, must be 1 or more"
            )
        return None if text is None else int(text)

    def check_base(self, base: HfFolder) -> None:
        """Refuse a base that the adapter was not made for (WeightsError).

        A folder written here carries its base's fingerprint; of others, the base that they name
        is looked at if it is a folder here, and else only shapes can be compared.
        """
        made_for = self._file.metadata.get(_FINGERPRINT)
        named = self._named_folder()
        if made_for is None and named and (named / "config.json").is_file():
            made_for = fingerprint(open_folder(named))  # without a tied head, as `base` is
        if made_for is not None and made_for != (found := fingerprint(base)):
            raise WeightsError(
                f"{self.path}: was made for another base"
                f" ({self._found.get('base_model_name_or_path')}, fingerprint {made_for[:12]}) "
                f"than {base.path} (fingerprint {found[:12]})"
            )

    def matrix(self, path: str, part: str) -> npt.NDArray[np.float32]:
        """lora_A (rank, in) or lora_B (out, rank) of a layer. Raises WeightsError where it holds a
        value that is not finite."""
        name = f"{_PREFIX}{path}.{part}.weight"
        values = self._file.float32(name)
        if not np.isfinite(values).all():
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: {name}: holds a value that is not finite"
            )
        return values

    def forget(self, path: str) -> None:
        """Let the system have the memory of a layer's matrices."""
        for part in PARTS:
            self._file.forget(f"{_PREFIX}{path}.{part}.weight")

    def _check_tensors(self, placed: Mapping[str, Placement], shapes: Mapping[str, Shape]) -> None:
        expected: dict[str, Shape] = {}
        for path, place in placed.items():
            out, into = shapes[path]
            expected[f"{_PREFIX}{path}.lora_A.weight"] = (place.rank, into)
            expected[f"{_PREFIX}{path}.lora_B.weight"] = (out, place.rank)
        found = self._file.tensors
        problems = [f"{name}: missing" for name in expected if name not in found]
        problems += [f"{name}: extra, no adapter goes there" for name in found.keys() - expected]
        for name in expected.keys() & found.keys():
            if (shape := found[name].shape) != expected[name]:
                rank = placed[name.removeprefix(_PREFIX).rpartition(".lora_")[0]].rank
                wanted = f"{expected[name]}, as the base and rank {rank} have it"
                problems.append(f"{name}: shape {shape}, must be {wanted}")
            if found[name].dtype not in FLOATS:
                problems.append(f"{name}: type {found[name].dtype}, must be one of {FLOATS}")
        if problems:
            source = self.path / ADAPTER_WEIGHTS
            raise WeightsError("\n".join(f"{source}: {problem}" for problem in sorted(problems)))


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def open_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterFolder, HfFolder]:
    """An adapter's folder and the base that it names, which must be the one it was made for."""
    adapter = AdapterFolder(folder)
    base = open_folder(adapter.base_folder())
    adapter.check_base(base)
    return adapter, base


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Source],
    *,
    layers: Collection[str],
) -> dict[str, FileDigest]:
    """Fill a folder that PEFT loads; returns the digests of the two files.

    `tensors` are A and B by PATH.lora_A.weight; `layers` the paths of all linear layers of the
    model, which decide whether target_modules can be short. Not atomic by itself.
    """
    text = json.dumps(to_peft(config, layers), indent=2, sort_keys=True, ensure_ascii=False)
    data = f"{text}\n".encode()
    (folder / ADAPTER_CONFIG).write_bytes(data)
    metadata = {"format": "pt"}
    if config.base_fingerprint is not None:
        metadata[_FINGERPRINT] = config.base_fingerprint
    if config.block_size is not None:
        metadata[_BLOCK_SIZE] = str(config.block_size)
    named = {f"{_PREFIX}{name}": source for name, source in tensors.items()}
    return {
        ADAPTER_CONFIG: FileDigest(hashlib.sha256(data).hexdigest(), len(data)),
        ADAPTER_WEIGHTS: write_safetensors(folder / ADAPTER_WEIGHTS, named, metadata),
    }


def linear_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Paths and shapes (out, in) of the linear layers that can have adapters."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in llama_shapes(config).items()
        if name.removesuffix(".weight").endswith(ALL_LINEAR)
    }


def fingerprint(folder: HfFolder) -> str:
    """SHA-256 over the name, type, shape and three samples of every tensor of a model.

    It tells bases apart without reading them whole, however they are split into shards.
    """
    digest = hashlib.sha256()
    for name in sorted(folder.names):
        digest.update(f"{name} {folder.dtype(name)} {folder.shape(name)}\n".encode())
        values = folder.array(name).reshape(-1)
        for start in (0, values.size // 2, max(0, values.size - _SAMPLE_ELEMENTS)):
            digest.update(values[start : start + _SAMPLE_ELEMENTS].tobytes())
        folder.forget(name)
    return digest.hexdigest()
