"""A Hugging Face LLaMA folder, written: config.json, tokenizer, and the tensors one at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.config import LlamaConfig
from tinyllama.errors import WeightsError
from tinyllama.weights.dtypes import BITS, Array, RawArray, dtype_name
from tinyllama.weights.hf_config import Ids, config_to_hf, generation_config, tokenizer_config
from tinyllama.weights.hf_names import INDEX, STORED, WEIGHTS, Shape, check_names, llama_shapes
from tinyllama.weights.safetensors import FileDigest, LazyArray, Source, write_safetensors


def save_folder(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    tensors: Mapping[str, Source],
    *,
    dtype: str,
    files: Mapping[str, bytes],
    bos_id: int | None,
    eos_id: Ids,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, FileDigest]:
    """Fill a folder that transformers loads; returns the digests of the files, for a manifest.

    `dtype` ("float32", "bfloat16", "float16") is what is stored, whatever floats the sources
    give; each source is asked once, when its turn comes. `files` are the tokenizer's, by name; a
    tokenizer.model without tokenizer_config.json gets one. Not atomic by itself: hand it the
    folder of `save_checkpoint` or `atomic_directory`. Raises WeightsError, also where the folder
    holds weights already (stale shards would be loaded with the new ones), and OSError.
    """
    folder = Path(folder)
    if dtype not in STORED:
        raise WeightsError(f"{folder}: dtype: got {dtype!r}, must be one of {', '.join(STORED)}")
    lazy = _stored_as(STORED[dtype], llama_shapes(config), tensors, str(folder))
    documents: dict[str, Mapping[str, Any]] = {
        "config.json": config_to_hf(config, bos_id, eos_id, dtype),
        "generation_config.json": generation_config(bos_id, eos_id),
    }
    if "tokenizer.model" in files and "tokenizer_config.json" not in files:
        documents["tokenizer_config.json"] = tokenizer_config(config.max_seq_len)
    _refuse_clashes(folder, files, documents)
    folder.mkdir(parents=True, exist_ok=True)
    digests = {name: _write_file(folder / name, data) for name, data in files.items()}
    digests |= {name: _write_json(folder / name, value) for name, value in documents.items()}
    return digests | _write_weights(folder, lazy, max_shard_bytes)


def _stored_as(
    stored: str, expected: Mapping[str, Shape], tensors: Mapping[str, Source], label: str
) -> dict[str, LazyArray]:
    """Sources with the type to store and the shape to find, in the order of the model."""
    found: dict[str, tuple[str, Shape]] = {}
    for name, source in tensors.items():
        if isinstance(source, np.ndarray | RawArray):
            found[name] = (dtype_name(name, source), tuple(source.shape))
        elif isinstance(source, LazyArray):
            found[name] = (source.dtype, source.shape)
        else:  # a callable is not asked yet: what it gives is checked when it is written
            found[name] = (stored, expected.get(name, ()))
    check_names(expected, found, label)
    return {name: LazyArray(stored, expected[name], _loader(tensors[name])) for name in expected}


def _loader(source: Source) -> Callable[[], Array]:
    if isinstance(source, LazyArray):
        return source.load
    if isinstance(source, np.ndarray | RawArray):
        return lambda: source
    return source


def _refuse_clashes(folder: Path, files: Iterable[str], documents: Iterable[str]) -> None:
    """Refuse weights that are there already and tokenizer files with names that are taken."""
    if stale := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise WeightsError(f"{folder}: holds {stale[0]} already: save into a new folder")
    for name in files:
        taken = name in set(documents) or name.endswith(".safetensors")
        if taken or name != os.path.basename(name) or name in ("", ".", "..", INDEX):
            raise WeightsError(f"{folder}: {name!r} cannot be the name of a tokenizer file")


def _write_weights(
    folder: Path, lazy: Mapping[str, LazyArray], max_shard_bytes: int
) -> dict[str, FileDigest]:
    """One file, or shards of at most `max_shard_bytes` of tensors (a larger tensor has its own)."""
    shards = list(_shards(lazy, max_shard_bytes))
    if len(shards) == 1:
        return {WEIGHTS: write_safetensors(folder / WEIGHTS, lazy)}
    digests: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = write_safetensors(folder / file, {name: lazy[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = sum(_size_bytes(array) for array in lazy.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return digests | {INDEX: _write_json(folder / INDEX, index)}


def _shards(lazy: Mapping[str, LazyArray], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    room_bytes = max_shard_bytes
    for name, array in lazy.items():
        if names and _size_bytes(array) > room_bytes:
            yield names
            names, room_bytes = [], max_shard_bytes
        names.append(name)
        room_bytes -= _size_bytes(array)
    yield names


def _size_bytes(array: LazyArray) -> int:
    return math.prod(array.shape) * BITS[array.dtype] // 8


def _write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    return _write_file(path, f"{text}\n".encode())


def _write_file(path: Path, data: bytes) -> FileDigest:
    path.write_bytes(data)
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))
