"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

    base_model.model.PATH.lora_A.weight [r, in],  base_model.model.PATH.lora_B.weight [out, r]
    W + scale B A,  scale = alpha / r, or alpha / sqrt(r) with use_rslora

A folder written here also carries, in the metadata of the second file: a fingerprint of its base,
which distinguishes bases of equal sizes; a digest of the vocabulary it was trained with; and the
block size of a base that was packed in 4 bits (QLoRA), since its adapters belong to that form.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import FLOATS, NumpyArray
from tinyllama.formats.huggingface import (
    Shape,
    linear_shapes_by_path,
)
from tinyllama.formats.int4 import Packing
from tinyllama.formats.models import ModelSource, open_model
from tinyllama.formats.safetensors import (
    FileDigest,
    SafetensorsFile,
    Source,
    write_safetensors,
)
from tinyllama.formats.untrusted import read_json
from tinyllama.system import checked
from tinyllama.system.json_files import short

ADAPTER_CONFIG = "adapter_config.json"

# Keys that are read here, or do not change what the adapter computes.
_KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern"}
_KNOWN |= {"alpha_pattern", "layers_to_transform", "layers_pattern", "base_model_name_or_path"}
_KNOWN |= {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}
_KNOWN |= {"megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"}
# The values of a key that are supported; of all other keys, only empty values are.
_ONLY: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
# Initializations that leave the base as it is; pissa, olora, corda and loftq change it.
_ONLY["init_lora_weights"] = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Placement:
    """The adapter of one layer: the rank of A and B, and the numerator of their scale."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a model: `placed` by the layer's path.

    base is the base's folder, base_fingerprint what `fingerprint` gives for it, if known;
    block_size and requantize those of a base which was packed when the adapters were trained on it,
    tokenizer_digest that of the vocabulary (`Tokenizer.vocabulary_digest`) they were trained with.
    """

    placed: Mapping[str, Placement]
    use_rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    base_fingerprint: str | None = None
    block_size: int | None = None
    requantize: bool = False
    tokenizer_digest: str | None = None

    def scale(self, path: str) -> float:
        """The factor of B A in a layer."""
        place = self.placed[path]
        return place.alpha / (math.sqrt(place.rank) if self.use_rslora else place.rank)

    def summary(self) -> str:
        """Ranks, numerators and layers, for messages."""
        kinds = {f"rank {place.rank}, alpha {place.alpha:g}" for place in self.placed.values()}
        names = {path.rpartition(".")[2] for path in self.placed}
        rslora = ", use_rslora" if self.use_rslora else ""
        return f"{'; '.join(sorted(kinds))}{rslora} on {', '.join(sorted(names))}"


def placement(entries: Mapping[str, Any], path: str) -> Placement:
    """The adapter that the parsed file gives a layer."""
    rank = _of_pattern(entries.get("rank_pattern"), path, entries.get("r", 8))
    alpha = _of_pattern(entries.get("alpha_pattern"), path, entries.get("lora_alpha", 8))
    return Placement(int(rank), float(alpha))


def targets(entries: Mapping[str, Any], path: str) -> bool:
    """Whether target_modules and layers_to_transform choose a layer, as PEFT decides it."""
    names = entries.get("target_modules") or ()
    if isinstance(names, str):
        return names.lower() == "all-linear" or bool(re.fullmatch(names, path))
    layers = entries.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or ()
    if numbers and int(path.split(".")[2]) not in numbers:
        return False
    return any(path == name or path.endswith(f".{name}") for name in names)


def to_peft(config: AdapterConfig, layers: Collection[str]) -> dict[str, Any]:
    """adapter_config.json: the most common rank and alpha, and patterns for other layers."""
    rank = Counter(place.rank for place in config.placed.values()).most_common(1)[0][0]
    alpha = Counter(place.alpha for place in config.placed.values()).most_common(1)[0][0]
    names = {path.rpartition(".")[2] for path in config.placed}
    everywhere = {path for path in layers if path.rpartition(".")[2] in names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(names if everywhere == set(config.placed) else config.placed),
        "rank_pattern": {p: x.rank for p, x in config.placed.items() if x.rank != rank},
        "alpha_pattern": {p: x.alpha for p, x in config.placed.items() if x.alpha != alpha},
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def unsupported(entries: Mapping[str, Any]) -> Iterator[str]:
    """One problem for each thing in the parsed file that is not supported here."""
    for key, value in entries.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                yield f"{key}: got {value!r}, must be {_ONLY[key][0]!r}: nothing else is supported"
        elif key not in _KNOWN and value not in (None, False, [], {}, ""):
            yield f"{key}: got {value!r}, must be absent or empty: it is not supported"
    pattern = entries.get("layers_pattern")
    if pattern not in (None, [], "", "layers", ["layers"]):
        yield f"layers_pattern: got {pattern!r}, must be 'layers'"
    if entries.get("layers_to_transform") is not None and isinstance(
        entries.get("target_modules"), str
    ):
        yield "layers_to_transform: must be absent where target_modules is one expression"
    yield from _wrong_numbers(entries)
    if isinstance(names := entries.get("target_modules"), str) and not _is_expression(names):
        yield f"target_modules: got {names!r}, must be a regular expression or a list of names"


def _wrong_numbers(entries: Mapping[str, Any]) -> Iterator[str]:
    """Problems with ranks and alphas, and with the patterns of layers that have others."""
    for key, pattern, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", (int, float)),
    ):
        word = "an integer" if kind is int else "a finite number"
        values = {key: entries.get(key, 8)}
        for layers, value in (entries.get(pattern) or {}).items():
            values[f"{pattern}.{layers}"] = value
            if not _is_expression(layers):
                yield f"{pattern}: got {layers!r}, must be a regular expression"
        for place, value in values.items():
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not (good and 0 < value < math.inf):
                yield f"{place}: got {value!r}, must be {word} above 0"


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _of_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a path, as PEFT matches it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


__all__ = [
    "PARTS",
    "AdapterConfig",
    "AdapterFolder",
    "Placement",
    "fingerprint",
    "is_adapter",
    "open_adapter",
    "save_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B")

_PREFIX = "base_model.model."
_FINGERPRINT = "base_fingerprint"
_BLOCK_SIZE = "base_int4_block_size"
_REQUANTIZE = "base_int4_requantized"  # present or not
_TOKENIZER = "tokenizer_vocabulary_sha256"
_SAMPLE_ELEMENTS = 1024
_WHOLE = "blake2b-256:"  # begins a fingerprint of all bytes
_PART_ELEMENTS = 1 << 20


class AdapterFolder:
    """An adapter's folder: its configuration is checked at once, its matrices are read later."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ConfigError (adapter_config.json) and WeightsError (no safetensors file)."""
        self.path = Path(folder)
        self._entries = read_json(self.path / ADAPTER_CONFIG)
        if problems := list(unsupported(self._entries)):
            source = self.path / ADAPTER_CONFIG
            raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
        if not (self.path / ADAPTER_WEIGHTS).is_file():
            raise WeightsError(f"{self.path}: holds no {ADAPTER_WEIGHTS}")
        self._file = SafetensorsFile(self.path / ADAPTER_WEIGHTS)

    def base_folder(self) -> Path:
        """The base that base_model_name_or_path names: where that is relative, from the adapter's
        folder, or else from the current one. Raises WeightsError if it is no folder."""
        if path := self._named_folder():
            return path
        named = self._entries.get("base_model_name_or_path")
        place = f" ({(self.path / str(named)).resolve()})" if named else ""
        raise WeightsError(
            f"{self.path / ADAPTER_CONFIG}: base_model_name_or_path: got {named!r}{place}, must be "
            "the folder of the base model; if that has moved, type --base FOLDER"
        )

    def _named_folder(self) -> Path | None:
        named = Path(str(self._entries.get("base_model_name_or_path") or ""))
        if named.is_absolute():
            return named if named.exists() else None
        paths = ((self.path / named).resolve(), named) if named.parts else ()
        return next((path for path in paths if path.exists()), None)

    def config(self, model: LlamaConfig) -> AdapterConfig:
        """The adapters on a model of these sizes.

        Raises WeightsError that names every tensor that is missing, extra, misshapen (a rank that
        is not the configuration's) or not floating, and ConfigError.
        """
        shapes = linear_shapes_by_path(model)
        chosen = (path for path in shapes if targets(self._entries, path))
        placed = {path: placement(self._entries, path) for path in chosen}
        if not placed:
            raise ConfigError(
                f"{self.path / ADAPTER_CONFIG}: target_modules: got "
                f"{self._entries.get('target_modules')!r}, must name linear layers of the model"
            )
        self._check_tensors(placed, shapes)
        base = self._entries.get("base_model_name_or_path")
        dropout = float(self._entries.get("lora_dropout") or 0.0)
        rslora, made_for = bool(self._entries.get("use_rslora")), self._file.metadata
        return AdapterConfig(
            placed,
            rslora,
            dropout,
            base,
            made_for.get(_FINGERPRINT),
            self.block_size(),
            _REQUANTIZE in made_for,
            self.tokenizer_digest,
        )

    @property
    def tokenizer_digest(self) -> str | None:
        """Of the vocabulary that the adapters were trained with; None if the folder has none."""
        return self._file.metadata.get(_TOKENIZER)

    def block_size(self) -> int | None:
        """Of the base in 4 bits that the adapters were trained on; None if it was not packed."""
        text = self._file.metadata.get(_BLOCK_SIZE)
        if text is not None and not (text.isdecimal() and int(text) > 0):
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: {_BLOCK_SIZE}: got {text!r}, must be 1 or more"
            )
        return None if text is None else int(text)

    def packing(self) -> Packing | None:
        """How the base was packed that the adapters were trained on; None if it was not."""
        block_size = self.block_size()
        if block_size is None:
            return None
        return Packing(block_size, _REQUANTIZE in self._file.metadata)

    def check_base(self, base: ModelSource) -> None:
        """Raise WeightsError if the adapter was not made for this base.

        Folders written here carry their base's fingerprint. For others it is computed from the base
        that they name, if that is a folder; if not, only shapes can be compared.
        """
        made_for = self._file.metadata.get(_FINGERPRINT)
        named = self._named_folder()
        if made_for is None and named and (named.is_file() or (named / "config.json").is_file()):
            made_for = fingerprint(open_model(named))  # without a tied head, as `base` is
        if made_for is not None and made_for != (digest := _as(made_for, base)):
            there = named or self._entries.get("base_model_name_or_path")
            raise WeightsError(
                f"{self.path}: was made for another base ({there}, fingerprint {_begin(made_for)}) "
                f"than {base.path} (fingerprint {_begin(digest)})"
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
        """Release the memory of a layer's matrices."""
        for part in PARTS:
            self._file.forget(f"{_PREFIX}{path}.{part}.weight")

    def _check_tensors(self, placed: Mapping[str, Placement], shapes: Mapping[str, Shape]) -> None:
        expected: dict[str, Shape] = {}
        for path, place in placed.items():
            out, into = shapes[path]
            expected[f"{_PREFIX}{path}.lora_A.weight"] = (place.rank, into)
            expected[f"{_PREFIX}{path}.lora_B.weight"] = (out, place.rank)
        stored = self._file.tensors
        problems = [f"{name}: missing" for name in expected if name not in stored]
        problems += [f"{name}: extra, no adapter goes there" for name in stored.keys() - expected]
        for name in expected.keys() & stored.keys():
            if (shape := stored[name].shape) != expected[name]:
                rank = placed[name.removeprefix(_PREFIX).rpartition(".lora_")[0]].rank
                wanted = f"{expected[name]}, as the base and rank {rank} have it"
                problems.append(f"{name}: shape {shape}, must be {wanted}")
            if stored[name].dtype not in FLOATS:
                problems.append(f"{name}: type {stored[name].dtype}, must be one of {FLOATS}")
        if problems:
            source = self.path / ADAPTER_WEIGHTS
            raise WeightsError("\n".join(f"{source}: {problem}" for problem in sorted(problems)))


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def open_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[AdapterFolder, ModelSource]:
    """An adapter's folder, and its base: the folder `base`, or else the one that it names.

    Raises WeightsError where that is not the base that the adapter was made for.
    """
    adapter = AdapterFolder(folder)
    opened = open_model(adapter.base_folder() if base is None else base)
    adapter.check_base(opened)
    return adapter, opened


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Source],
    *,
    layers: Collection[str],
) -> dict[str, FileDigest]:
    """Fill a folder that PEFT loads; returns the digests of the two files.

    `tensors` are A and B by PATH.lora_A.weight; `layers` the paths of all linear layers of the
    model, which decide whether target_modules can be short. The base's path is written relative to
    the folder where both have a common parent, so that they can be moved together. Not atomic by
    itself; a folder of another name beside this one may become the adapter's.
    """
    config = replace(config, base=_path_from(folder, config.base))
    text = json.dumps(to_peft(config, layers), indent=2, sort_keys=True, ensure_ascii=False)
    data = f"{text}\n".encode()
    (folder / ADAPTER_CONFIG).write_bytes(data)
    metadata = {"format": "pt"}
    if config.base_fingerprint is not None:
        metadata[_FINGERPRINT] = config.base_fingerprint
    if config.block_size is not None:
        metadata[_BLOCK_SIZE] = str(config.block_size)
        if config.requantize:
            metadata[_REQUANTIZE] = "true"
    if config.tokenizer_digest is not None:
        metadata[_TOKENIZER] = config.tokenizer_digest
    named = {f"{_PREFIX}{name}": source for name, source in tensors.items()}
    return {
        ADAPTER_CONFIG: FileDigest(hashlib.sha256(data).hexdigest(), len(data)),
        ADAPTER_WEIGHTS: write_safetensors(folder / ADAPTER_WEIGHTS, named, metadata),
    }


def _path_from(folder: Path, base: str | None) -> str | None:
    """A base's path from an adapter's folder; absolute where only the root is common to both."""
    if base is None or not Path(base).is_absolute():
        return base
    here, there = folder.resolve(), Path(base).resolve()
    if os.path.commonpath((here, there)) == here.anchor:
        return base
    return Path(os.path.relpath(there, here)).as_posix()


def fingerprint(folder: ModelSource) -> str:
    """BLAKE2b-256 over the name, type, shape and all bytes of every tensor of a model.

    It does not depend on their shards. Several threads take it; of large files it is remembered
    for a day (system/checked.py).
    """
    path = folder.path
    files = [path] if path.is_file() else [path / name for name in sorted(set(folder.files))]
    return checked.digest("fingerprint", files, lambda: f"{_WHOLE}{_whole_fingerprint(folder)}")


def _whole_fingerprint(folder: ModelSource) -> str:
    names = sorted(folder.names)
    arrays = [folder.array(name).reshape(-1) for name in names]  # maps of files: nothing is read

    def summed(name: str, values: NumpyArray) -> bytes:
        digest = hashlib.blake2b(digest_size=32)
        digest.update(f"{name} {folder.dtype(name)} {folder.shape(name)}\n".encode())
        for start in range(0, values.size, _PART_ELEMENTS):
            digest.update(values[start : start + _PART_ELEMENTS].view(np.uint8).data)
        folder.forget(name)
        return digest.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = pool.map(summed, names, arrays)
        return hashlib.blake2b(b"".join(sums), digest_size=32).hexdigest()


def _begin(digest: str) -> str:
    return short(digest.removeprefix(_WHOLE), 12)


def _as(made_for: str, base: ModelSource) -> str:
    """A base's fingerprint, taken like the one that an adapter carries."""
    return fingerprint(base) if made_for.startswith(_WHOLE) else _sampled_fingerprint(base)


def _sampled_fingerprint(folder: ModelSource) -> str:
    """SHA-256 over the name, type, shape and three samples of every tensor, as adapters of earlier
    versions carry it."""
    digest = hashlib.sha256()
    for name in sorted(folder.names):
        digest.update(f"{name} {folder.dtype(name)} {folder.shape(name)}\n".encode())
        values = folder.raw(name)
        for start in (0, values.size // 2, max(0, values.size - _SAMPLE_ELEMENTS)):
            digest.update(values[start : start + _SAMPLE_ELEMENTS].tobytes())
        folder.forget(name)
    return digest.hexdigest()
