"""Adapters merged into a copy of their base, one tensor at a time.

    W' = W + sum over adapters of weight * scale * B A        (with unmerge: W - ...)

The copy has the base's files: the same shards, types (unless others are asked for), configuration
and tokenizer. It appears whole or not at all, and never in the base's place. Arithmetic is float32;
what is stored narrower is rounded once, to nearest.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinyllama.errors import WeightsError
from tinyllama.files import atomic_directory
from tinyllama.weights.dtypes import BITS, Array
from tinyllama.weights.hf_config import read_json
from tinyllama.weights.hf_names import INDEX, STORED, WEIGHTS
from tinyllama.weights.hf_read import HfFolder, open_folder
from tinyllama.weights.peft import PARTS, AdapterConfig, AdapterFolder
from tinyllama.weights.safetensors import LazyArray, write_safetensors

Stored = Literal["keep", "fp32", "bf16", "fp16"]
# safetensors' and transformers' names of the types that can be asked for.
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What is copied beside the weights: configuration, tokenizer, templates, licences.
_COPIED = (".json", ".jinja", ".model", ".txt", ".md")
# The state of a training run and digests of other files.
_LEFT = ("training_state.json", "manifest.json", INDEX)


@dataclass(frozen=True)
class Merged:
    """What a merge did: `changed` of `total` tensors, to `bytes` of weights."""

    changed: int
    total: int
    bytes: int


@dataclass(frozen=True)
class _Part:
    """One adapter on the base, and what its B A are multiplied by besides their scale."""

    folder: AdapterFolder
    config: AdapterConfig
    weight: float


def merge(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: Stored = "keep",
    unmerge: bool = False,
) -> Merged:
    """Write `base` with `adapters` (folder, weight) as the folder `out`, which must not exist.

    `unmerge` takes them out of a base that they were merged into; then only shapes can say
    whether it is the right one. Raises ConfigError and WeightsError, and then leaves no `out`.
    """
    base, out = Path(base), Path(out)
    _refuse_place(base, out)
    folder = open_folder(base)
    sign = -1.0 if unmerge else 1.0
    parts = [_part(folder, path, sign * weight, check=not unmerge) for path, weight in adapters]
    try:
        with atomic_directory(out) as unfinished:
            _copy_files(base, unfinished, None if dtype == "keep" else _TYPES[dtype])
            return _write_weights(folder, parts, unfinished, dtype)
    except OSError as error:
        raise WeightsError(f"{out}: cannot be written: {error}") from error


def parse_adapter(text: str) -> tuple[Path, float]:
    """DIR or DIR:WEIGHT, as on the command line; a folder that exists by the whole name wins."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.isdir(text):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(value):
        raise WeightsError(f"--adapter {text}: weight: got {weight}, must be a finite number")
    return Path(path), value


def _refuse_place(base: Path, out: Path) -> None:
    if out.resolve() == base.resolve():
        raise WeightsError(f"{out}: is the base itself, which is never written to")
    if os.path.lexists(out):
        raise WeightsError(f"{out}: exists already: name a new folder")


def _part(base: HfFolder, path: str | Path, weight: float, *, check: bool) -> _Part:
    adapter = AdapterFolder(path)
    if check:
        adapter.check_base(base)
    return _Part(adapter, adapter.config(base.config), weight)


def _write_weights(base: HfFolder, parts: Sequence[_Part], out: Path, dtype: Stored) -> Merged:
    """The base's files with merged tensors, and an index where there are shards."""
    changed = total_bytes = 0
    files, reader = base.files, _Reader(base)
    for file, names in files.items():
        tensors = {}
        for name in names:
            found = [p for p in parts if name.removesuffix(".weight") in p.config.placed]
            stored = base.dtype(name) if dtype == "keep" else STORED[_TYPES[dtype]]
            tensors[name] = LazyArray(stored, base.shape(name), partial(reader.load, name, found))
            changed += bool(found)
            total_bytes += math.prod(base.shape(name)) * BITS[stored] // 8
        write_safetensors(out / file, tensors)
    if set(files) != {WEIGHTS}:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(out / INDEX, index)
    return Merged(changed, len(base.names), total_bytes)


class _Reader:
    """Reads the base, and lets the system have the pages of a tensor when the next is read."""

    def __init__(self, base: HfFolder) -> None:
        self.base = base
        self._held: str | None = None

    def load(self, name: str, parts: Sequence[_Part]) -> Array:
        """A tensor, as it is stored or, where adapters change it, merged in float32."""
        if self._held is not None:
            self.base.forget(self._held)
        self._held = name
        if not parts:
            return self.base.source(name).load()
        found = self.base.float32(name)
        merged = found if found.flags.writeable else found.copy()  # a view of the file is not
        path = name.removesuffix(".weight")
        for part in parts:
            scale = np.float32(part.weight * part.config.scale(path))
            a, b = (part.folder.matrix(path, which) for which in PARTS)
            merged += (b * scale) @ a
        return merged


def _copy_files(base: Path, out: Path, dtype: str | None) -> None:
    """Everything that is neither weights nor the state of a run; config.json tells the type."""
    for path in sorted(base.iterdir()):
        copied = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and copied and path.name not in _LEFT:
            shutil.copyfile(path, out / path.name)
    if dtype is not None:
        config = read_json(out / "config.json")
        # Both names of the type, in the files of transformers 4 and 5.
        _write_json(out / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
