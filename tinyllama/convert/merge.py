"""Adapters merged into a copy of their base, one tensor at a time.

    W' = W + sum over adapters of weight * scale * B A        (with unmerge: W - ...)

Adapters of a QLoRA run were trained on the base in 4 bits. For them W is the dequantized weight
(embedding and head rounded to bfloat16, as in the run), so that the merged model computes what the
run computed; the difference to the base is measured per tensor. The original W can be chosen too.

The copy has the base's shards, types (unless others are chosen), configuration and tokenizer. It
appears complete or not at all, and never replaces the base. Arithmetic is float32; narrower types
are rounded once, to nearest.
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinyllama.errors import WeightsError
from tinyllama.formats import hub, int4
from tinyllama.formats.adapted import replaced
from tinyllama.formats.dtypes import (
    BITS,
    Array,
    RawArray,
    bits_of,
    convert,
    dtype_name,
    to_float32,
)
from tinyllama.formats.huggingface import (
    EMBEDDING,
    HEAD,
    INDEX,
    STORED,
    WEIGHTS,
    generation_config,
)
from tinyllama.formats.int4 import (
    Weights,
    as_packed,
    check_block_size,
    row_parts,
)
from tinyllama.formats.model_config import config_to_hf
from tinyllama.formats.models import ModelSource, open_model
from tinyllama.formats.peft import AdapterConfig, AdapterFolder
from tinyllama.formats.safetensors import LazyArray, write_safetensors
from tinyllama.system.files import atomic_directory, remove_partials
from tinyllama.system.untrusted import read_json
from tinyllama.tokenizers.opening import holds_tokenizer, open_tokenizer
from tinyllama.tokenizers.tokenizer import write_files
from tinyllama.train.manifest import verify_loaded

Stored = Literal["keep", "fp32", "bf16", "fp16"]
AS_TRAINED: Literal["as trained"] = "as trained"
Packing = int | Literal["as trained"] | None
# The names that transformers uses for the types that can be chosen.
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PART_ELEMENTS = 1 << 20
# What is copied beside the weights: configuration, tokenizer, templates, licences.
_COPIED = (".json", ".jinja", ".model", ".txt", ".md")
# The state of a training run and digests of other files.
_LEFT = ("training_state.json", "manifest.json", INDEX)


@dataclass(frozen=True)
class Lost:
    """The difference w - held between tensors of the base and their form in 4 bits."""

    name: str
    count: int
    largest: float  # of |w - held|
    squares: float  # sum of (w - held)^2
    own_squares: float  # sum of w^2

    @property
    def rms(self) -> float:
        """Root of the mean of (w - held)^2."""
        return math.sqrt(self.squares / max(self.count, 1))

    @property
    def relative(self) -> float:
        """That root over the root of the mean of w^2."""
        return math.sqrt(self.squares / self.own_squares) if self.own_squares else 0.0


def total_lost(parts: Sequence[Lost]) -> Lost:
    """The sum of several."""
    return Lost(
        "total",
        sum(part.count for part in parts),
        max((part.largest for part in parts), default=0.0),
        sum(part.squares for part in parts),
        sum(part.own_squares for part in parts),
    )


@dataclass(frozen=True)
class Merged:
    """The result of a merge: `changed` of `total` tensors, `bytes` of weights.

    block_size is that of the 4 bits into which the base was packed, or None; `lost` is the
    difference which that made, per tensor. `as_stored` counts layers in the blocks of a GGUF file,
    or widened from them, which nothing rounded.
    """

    changed: int
    total: int
    bytes: int
    block_size: int | None = None
    lost: tuple[Lost, ...] = ()
    as_stored: int = 0

    @property
    def packed(self) -> int:
        """Layers that were rounded to 4 bits."""
        return sum(part.name not in (EMBEDDING, HEAD) for part in self.lost)


@dataclass(frozen=True)
class _Part:
    """One adapter, and the factor of its B A besides the scale."""

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
    packing: Packing = AS_TRAINED,
) -> Merged:
    """Write `base` with `adapters` (folder, weight) as the folder `out`, which must not exist.

    `packing` is the block size with which the base is packed into 4 bits first: the one that the
    adapters were trained on, a number, or None for the base as it is.
    `unmerge` subtracts adapters from a base that they were merged into; nothing is packed, and only
    shapes can show whether it is the right base. Checkpoints of ours are always read in full and
    compared with their sums. Raises ConfigError, WeightsError and CheckpointError, and then leaves
    no `out`.
    """
    base, out = Path(base), Path(out)
    _refuse_place(base, out)
    folder = open_model(base)
    base = folder.path
    sign = -1.0 if unmerge else 1.0
    parts = [_part(folder, path, sign * weight, check=not unmerge) for path, weight in adapters]
    _check_tokenizer(base, parts)
    _check_whole(parts)
    whole = replaced(folder, ((part.folder, part.config) for part in parts))
    block_size = None if unmerge else _block_size(parts, packing)
    stored: Collection[str] = ()
    if block_size is not None:
        requantize = any(part.config.requantize for part in parts)
        stored = int4.Packing(block_size, requantize).stored(folder)
        check_block_size(folder.config, block_size, stored)
    try:
        remove_partials(out.parent)  # of merges that were killed
        with ThreadPoolExecutor(1) as pool, atomic_directory(out) as unfinished:
            sums = pool.submit(_verify, [base, *(Path(path) for path, _ in adapters)])
            _copy_files(base, unfinished)
            _write_config(whole, unfinished, None if dtype == "keep" else _TYPES[dtype])
            reader = _Reader(whole, block_size, stored)
            merged = _write_weights(reader, parts, unfinished, dtype)
            sums.result()
            return merged
    except OSError as error:
        raise WeightsError(f"{out}: cannot be written: {error}") from error


def _verify(folders: Sequence[Path]) -> None:
    for folder in folders:
        verify_loaded(folder, remembered=False)


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


def _part(base: ModelSource, path: str | Path, weight: float, *, check: bool) -> _Part:
    adapter = AdapterFolder(path)
    if check:
        adapter.check_base(base)
    return _Part(adapter, adapter.config(base.config), weight)


def _check_whole(parts: Sequence[_Part]) -> None:
    """Raise WeightsError for tensors in place of the base's that cannot be merged exactly."""
    seen: dict[str, Path] = {}
    for part in parts:
        for name in part.config.saved:
            if part.weight != 1:
                raise WeightsError(
                    f"{part.folder.path}: {name}: stands in place of the base's (modules_to_save), "
                    f"which a weight of {part.weight:g} cannot be applied to: merge it with 1"
                )
            if name in seen:
                raise WeightsError(
                    f"{part.folder.path}: {name}: stands in place of the base's (modules_to_save), "
                    f"and {seen[name]} holds another one: merge one of them"
                )
            seen[name] = part.folder.path


def _check_tokenizer(base: Path, parts: Sequence[_Part]) -> None:
    """Raise WeightsError if adapters were trained on other tokens than the base's tokenizer gives.

    Adapters without a digest (PEFT's) and bases without a tokenizer cannot be compared.
    """
    digests = {part.folder.path: part.config.tokenizer_digest for part in parts}
    if not any(digests.values()) or not holds_tokenizer(base):
        return
    tokenizer = open_tokenizer(base)
    own = tokenizer.vocabulary_digest
    for path, digest in digests.items():
        if digest is not None and digest not in (own, *tokenizer.older_digests):
            raise WeightsError(
                f"{path}: was trained with a tokenizer (vocabulary {digest[:12]}) that is not the "
                f"one of {base} (vocabulary {own[:12]}), which the merged model would be given: "
                "train the adapter again with the base's tokenizer"
            )


def _block_size(parts: Sequence[_Part], packing: Packing) -> int | None:
    """The chosen block size, or the one that all adapters were trained on."""
    if packing != AS_TRAINED:
        return packing
    sizes = {part.config.block_size for part in parts}
    if len(sizes) > 1:
        trained = ", ".join(
            f"{part.folder.path} on "
            + (f"4 bits in groups of {size}" if (size := part.config.block_size) else "the base")
            for part in parts
        )
        raise WeightsError(
            f"the adapters were trained on different forms of the base ({trained}): choose one "
            "with --quantized-base and --block-size, or with --full-base"
        )
    return sizes.pop() if sizes else None


def _write_weights(reader: "_Reader", parts: Sequence[_Part], out: Path, dtype: Stored) -> Merged:
    """The base's files with merged tensors, and an index where there are shards."""
    changed = total_bytes = 0
    base, files = reader.base, reader.base.files
    for file, names in files.items():
        tensors = {}
        for name in names:
            applied = [p for p in parts if name.removesuffix(".weight") in p.config.placed]
            stored = _kept_type(base, name) if dtype == "keep" else STORED[_TYPES[dtype]]
            tensors[name] = LazyArray(stored, base.shape(name), partial(reader.load, name, applied))
            changed += bool(applied) or any(name in p.config.saved for p in parts)
            total_bytes += math.prod(base.shape(name)) * BITS[stored] // 8
        write_safetensors(out / file, tensors)
    if set(files) != {WEIGHTS}:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(out / INDEX, index)
    lost = tuple(reader.lost)
    counts = changed, len(base.names), total_bytes
    return Merged(*counts, reader.block_size, lost, len(reader.stored))


def _kept_type(base: ModelSource, name: str) -> str:
    """The type of a tensor of the base; of one in blocks that of its exact values."""
    return "F32" if base.is_quantized(name) else base.dtype(name)


class _Reader:
    """Reads the base's tensors; the memory of one is released when the next is read."""

    def __init__(
        self, base: ModelSource, block_size: int | None, stored: Collection[str] = ()
    ) -> None:
        """With a block_size, tensors are as a QLoRA run holds them, and `lost` is noted; it packs
        no layer whose path is in `stored`."""
        self.base, self.block_size, self.stored = base, block_size, stored
        self.lost: list[Lost] = []
        self._held: str | None = None

    def load(self, name: str, parts: Sequence[_Part]) -> Array:
        """A tensor: as it is stored, or merged in float32 where adapters change it."""
        if self._held is not None:
            self.base.forget(self._held)
        self._held = name
        path = name.removesuffix(".weight")
        packed = self.block_size is not None and len(self.base.shape(name)) == 2
        packed = packed and path not in self.stored
        if not parts and not packed:
            array = self.base.source(name).load()
            self._check_finite(name, array)
            return array
        original = self.base.float32(name)
        if packed:
            merged = self._in_4_bits(name, original)
        else:
            # A view of the file cannot be written to.
            merged = original if original.flags.writeable else original.copy()
        for part in parts:
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                merged += part.folder.delta(path, part.weight * part.config.scale(path))
            part.folder.forget(path)
        self._check_finite(name, merged)
        return merged

    def _check_finite(self, name: str, array: Array) -> None:
        """Raise WeightsError for an infinity or a NaN, of the base or of a sum that overflowed."""
        flat, dtype = bits_of(array).reshape(-1), dtype_name(name, array)
        for start in range(0, flat.size, _PART_ELEMENTS):
            part = flat[start : start + _PART_ELEMENTS]
            finite = (part & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(part)
            if not finite.all():
                raise WeightsError(
                    f"{self.base.path}: {name}: would hold a value that is not finite in the merged"
                    " model"
                )

    def _in_4_bits(self, name: str, original: Weights) -> Weights:
        """A matrix as a QLoRA run holds it, in float32; the difference is added to `lost`."""
        assert self.block_size is not None
        if name in (EMBEDDING, HEAD):
            held = np.empty_like(original)
            for rows in row_parts(original.shape):
                bits = convert(name, original[rows], "BF16")
                held[rows] = to_float32(name, RawArray("BF16", held[rows].shape, bits))
        else:
            held = as_packed(f"{self.base.path}: {name}", original, self.block_size)
        largest = squares = own_squares = 0.0
        for rows in row_parts(original.shape):
            away = original[rows].astype(np.float64) - held[rows]
            largest = max(largest, float(np.abs(away).max()))
            squares += float((away * away).sum())
            own_squares += float(np.square(original[rows], dtype=np.float64).sum())
        self.lost.append(Lost(name, original.size, largest, squares, own_squares))
        return held


def _copy_files(base: Path, out: Path) -> None:
    """Copy all but weights and the state of a run, and what transformers needs of a tokenizer.

    Raises WeightsError for a link out of the base: it may lead to any file of this user, which the
    copy would then be given away with.
    """
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        copied = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and copied and path.name not in _LEFT:
            if hub.leads_out(path):
                raise WeightsError(
                    f"{path}: is a link out of its folder, which is not followed when a model is "
                    "copied: put the file itself there"
                )
            shutil.copyfile(path, out / path.name)
    if holds_tokenizer(base):
        write_files(open_tokenizer(base), out)


def _write_config(base: ModelSource, out: Path, dtype: str | None) -> None:
    """config.json: the base's own, with the chosen type, or one of a base that has none."""
    path, changes = out / "config.json", dict[str, Any]()
    if not path.exists():
        kind = dtype or _TYPE_NAMES[base.dtype("model.norm.weight")]
        ids = base.bos_id, list(base.eos_ids)
        _write_json(path, config_to_hf(base.config, *ids, kind))
        if not (out / "generation_config.json").exists():  # the tokenizer's, with every end
            _write_json(out / "generation_config.json", generation_config(*ids))
    elif dtype is not None:  # both names of the type, in the files of transformers 4 and 5
        changes = {"dtype": dtype, "torch_dtype": dtype}
    if base.config.tie_word_embeddings is False and base.entries.get("tie_word_embeddings"):
        changes["tie_word_embeddings"] = False
    if changes:
        _write_json(path, read_json(path) | changes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
