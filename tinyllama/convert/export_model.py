"""Whole models for other programs: what an export is, and writing and checking a model.

    job       what is exported, and how; where its files go
    model     a source, its tokenizer, and the form that it is written in
    writing   Hugging Face's and mlx-lm's folder; GGUF with a Modelfile

export.py begins here or with an adapter (export_adapter.py), and gives the result its name.
"""

import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinyllama.config import LlamaConfig
from tinyllama.convert.check import LIMITS, TEXT, TOKENS, Check, Matrix, Read, compare
from tinyllama.convert.links import refuse_links_out
from tinyllama.errors import TokenizerError, WeightsError
from tinyllama.formats.dtypes import BITS, Array, NumpyArray, RawArray, convert, to_float32
from tinyllama.formats.gguf import SUFFIX, GgufFile
from tinyllama.formats.gguf_writer import (
    GgufTensor,
    encoded,
    gguf_name,
    kind_for,
    model_fields,
    permuted,
    q4_0_as_trained,
    rope_factors,
    write_gguf,
)
from tinyllama.formats.huggingface import EMBEDDING, HEAD, STORED, llama_shapes, save_folder
from tinyllama.formats.int4 import Packing, as_packed
from tinyllama.formats.modelfile import NAME as MODELFILE
from tinyllama.formats.modelfile import modelfile
from tinyllama.formats.models import ModelSource, open_model
from tinyllama.tokenizers.files import TRAVELLING
from tinyllama.tokenizers.opening import holds_tokenizer, open_tokenizer
from tinyllama.tokenizers.to_gguf import vocabulary_fields
from tinyllama.tokenizers.tokenizer import Tokenizer

Target = Literal["hf", "gguf", "mlx"]
# Names of types -> the formats' own.
KINDS = STORED | {"q8_0": "Q8_0", "q4_0": "Q4_0"}

MODEL_GGUF = f"model{SUFFIX}"
_SPARE_BYTES = 16 << 20  # for the files beside the weights


@dataclass(frozen=True)
class Exported:
    """What was written: the files (the weights' first), their bytes, the comparison with the
    source, and what a user should know besides."""

    files: tuple[Path, ...]
    size_bytes: int
    kind: str
    check: Check
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What is exported, and how.

    dtype: a value of KINDS, or None for the type that the source is stored in. base: where an
    adapter's base is, if not where it was. merged: an adapter becomes a whole model. with_base: the
    adapter's base is written beside it, in the form that it was trained on.
    """

    source: Path
    out: Path
    target: Target
    dtype: str | None = None
    base: Path | None = None
    merged: bool = False
    with_base: bool = False


class Place(NamedTuple):
    """A folder to fill. Of an export that is one file, `file` is its name there."""

    folder: Path
    file: str | None

    def gguf(self, name: str) -> Path:
        """Where a GGUF file goes whose name in an exported folder is `name`."""
        return self.folder / (self.file or name)


def modelfile_path(out: Path) -> Path:
    """Where the Modelfile of a single GGUF file goes: `Modelfile`, or a name of its own where
    there is one already. Raises WeightsError."""
    for path in (out.with_name(MODELFILE), out.with_suffix(f".{MODELFILE}")):
        if not os.path.lexists(path):
            return path
    raise WeightsError(f"{path}: exists already: name another file or folder")


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise WeightsError if the disk of a folder has no room for so many bytes of weights."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + _SPARE_BYTES:
        raise WeightsError(
            f"{folder.parent}: {free_bytes:,} bytes are free, the export takes {needed_bytes:,}"
        )


def finished(job: Job, place: Place, kind: str, check: Check, notes: Sequence[str]) -> Exported:
    """What was written into a place, whose name it does not have yet."""
    paths = [path for path in place.folder.iterdir() if path.is_file()]
    paths.sort(key=lambda path: -path.stat().st_size)
    if place.file is None:
        files = [job.out / path.name for path in paths]
    else:
        files = [job.out, modelfile_path(job.out)]
    size_bytes = sum(path.stat().st_size for path in paths)
    return Exported(tuple(files), size_bytes, kind, check, tuple(notes))


# ---- what is exported


@dataclass(frozen=True)
class Text:
    """What an export needs of a tokenizer, if there is one; of a GGUF source, its metadata."""

    tokenizer: Tokenizer | None
    metadata: Mapping[str, Any]
    source: str

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that travel with the model."""
        return {} if self.tokenizer is None else self.tokenizer.files

    def fields(self, rows: int) -> dict[str, Any]:
        """The tokenizer as the metadata of GGUF, in a model with so many embeddings."""
        if self.metadata:
            return dict(self.metadata)
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.source}: has no tokenizer, and a GGUF file without one generates no text"
            )
        return vocabulary_fields(self.tokenizer, rows, self.source)

    def known_fields(self, rows: int) -> dict[str, Any]:
        """The same for a file that works without a tokenizer: nothing where there is none, or one
        that llama.cpp lacks."""
        try:
            return self.fields(rows)
        except TokenizerError:
            return {}

    def check(self, path: Path) -> None:
        """Raise TokenizerError if the tokenizer in a GGUF file gives a text other ids."""
        if self.tokenizer is None:
            return
        ours, theirs = (each.encode(TEXT) for each in (self.tokenizer, open_tokenizer(path)))
        if ours != theirs:
            raise TokenizerError(
                f"{self.source}: its tokenizer gives other ids when it is read back from a GGUF "
                "file: it has rules that such a file cannot hold"
            )

    def sample(self, config: LlamaConfig) -> list[int]:
        """Ids of a real text; of a model without a tokenizer, ids from all over its vocabulary."""
        count = min(TOKENS, config.max_seq_len)
        if self.tokenizer is None:
            step = max(1, config.vocab_size // count)
            return list(range(0, config.vocab_size, step))[:count]
        return [*self.tokenizer.begin, *self.tokenizer.encode(TEXT)][:count]


def text_of(path: Path, source: ModelSource) -> Text:
    """The tokenizer in an adapter's folder, or else in its base's."""
    place = path if path.is_dir() and holds_tokenizer(path) else source.path
    refuse_links_out(place / name for name in TRAVELLING)
    if not isinstance(source, GgufFile) or place != source.path:
        tokenizer = open_tokenizer(place) if holds_tokenizer(place) else None
        return Text(tokenizer, {}, str(place))
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in source.metadata.items()
        if key.startswith("tokenizer.")
    }
    is_whole = "tokenizer.ggml.model" in metadata
    return Text(open_tokenizer(place) if is_whole else None, metadata, str(place))


@dataclass(frozen=True)
class Model:
    """A model to write, its tokenizer, and how it is packed if an adapter was trained on it so."""

    source: ModelSource
    text: Text
    packing: Packing | None = None
    _held: list[str] = field(default_factory=list)

    @property
    def config(self) -> LlamaConfig:
        """The source's."""
        return self.source.config

    def release(self, name: str) -> None:
        """Give back the memory of the tensor read before `name`."""
        for held in self._held:
            self.source.forget(held)
        self._held[:] = [name]

    def read(self, name: str) -> Matrix:
        """A tensor in float32, as it is to be computed with."""
        self.release(name)
        values = self.source.float32(name)
        if not self.is_rounded(name):
            return values
        if name in (EMBEDDING, HEAD):
            return to_float32(name, RawArray("BF16", values.shape, convert(name, values, "BF16")))
        assert self.packing is not None
        return as_packed(f"{self.source.path}: {name}", values, self.packing.block_size)

    def stored_kind(self, name: str) -> str:
        """The type that a tensor has in the source, or in the 4 bits that were trained on."""
        if self.is_rounded(name):
            return "BF16" if name in (EMBEDDING, HEAD) else "Q4_0"
        if isinstance(self.source, GgufFile):
            return self.source.stored_type(name)
        return self.source.dtype(name)

    def is_rounded(self, name: str) -> bool:
        """Whether a QLoRA run holds a tensor in another form than the source does."""
        if self.packing is None or len(self.source.shape(name)) != 2:
            return False
        return name.removesuffix(".weight") not in self._kept

    @cached_property
    def _kept(self) -> Collection[str]:
        """Paths of the layers that a QLoRA run leaves as they are stored."""
        return {} if self.packing is None else self.packing.stored(self.source)


# ---- writing and checking


def write_whole(job: Job, place: Place) -> Exported:
    """Write the model that the source is."""
    source = open_model(job.source)
    model = Model(source, text_of(job.source, source))
    return write_model(job, place, model, model.read)


def write_model(
    job: Job, place: Place, model: Model, original: Read, narrow: Collection[str] = ()
) -> Exported:
    """Write and check a whole model; `original` gives the values that it must have, of tensors in
    `narrow` to within bfloat16."""
    if job.target == "gguf":
        path = place.gguf(MODEL_GGUF)
        kinds = write_gguf_model(path, job, model)
        write_modelfile(place, model, path.name)
        model.text.check(path)
        read_back: ModelSource = GgufFile(path)
    else:
        kinds = _write_folder(place.folder, job, model)
        read_back = open_model(place.folder)
    written = Model(read_back, model.text)
    check = compare(
        (model.config, original),
        (written.config, written.read),
        lambda name: _wider(rounding(model, kinds, name), "BF16" if name in narrow else "F32"),
        model.text.sample(model.config),
        str(job.out),
    )
    notes = _notes(model, kinds) if job.target == "gguf" else []
    return finished(job, place, _most(kinds), check, notes)


def _wider(*kinds: str) -> str:
    """The type whose rounding is the largest."""
    return max(kinds, key=LIMITS.__getitem__)


def rounding(model: Model, kinds: Mapping[str, str], name: str) -> str:
    """The type that a tensor was rounded to; F32 if it stayed what it was."""
    return "F32" if kinds[name] == model.stored_kind(name) else kinds[name]


def _most(kinds: Mapping[str, str]) -> str:
    values = [kind for kind in kinds.values() if kind != "F32"] or ["F32"]
    return max(values, key=values.count)


def _notes(model: Model, kinds: Mapping[str, str]) -> list[str]:
    notes = []
    window, length = model.config.sliding_window, model.config.max_seq_len
    if window is not None and window < length:
        notes.append(f"llama.cpp has no sliding window here: the context is {window}, not {length}")
    chosen = set(kinds.values()) & {"Q8_0", "Q4_0"}
    if chosen and (other := [n for n, kind in kinds.items() if kind == "F16"]):
        notes.append(f"{len(other)} tensors are F16: their rows are no multiple of 32")
    return notes


# ---- Hugging Face and MLX


def _write_folder(folder: Path, job: Job, model: Model) -> dict[str, str]:
    """Write a folder that transformers and mlx-lm load; returns the type of each tensor."""
    shapes = llama_shapes(model.config)
    kind = job.dtype or common_float([model.source.dtype(name) for name in shapes])
    check_room(folder, sum(map(math.prod, shapes.values())) * BITS[kind] // 8)
    save_folder(
        folder,
        model.config,
        {name: partial(_as_stored, model, name) for name in shapes},
        dtype={form: name for name, form in STORED.items()}[kind],
        files=model.text.files,
        bos_id=model.source.bos_id,
        eos_id=model.source.eos_ids,
        base=model.source.entries,
    )
    return dict.fromkeys(shapes, kind)


def _as_stored(model: Model, name: str) -> Array:
    model.release(name)
    return model.source.source(name).load()


def common_float(kinds: Sequence[str]) -> str:
    """The type that holds the values of all of these exactly."""
    return kinds[0] if len(set(kinds)) == 1 else "F32"


# ---- GGUF


def write_gguf_model(path: Path, job: Job, model: Model) -> dict[str, str]:
    """Write a model as one file; returns the type of each tensor by Hugging Face's name."""
    config = model.config
    shapes = llama_shapes(config)
    kinds = {name: _kind(model, name, shape, job.dtype) for name, shape in shapes.items()}
    tensors = {
        gguf_name(name): GgufTensor(kind, shapes[name], partial(_loaded, model, name, kind))
        for name, kind in kinds.items()
    } | rope_factors(config)
    check_room(path.parent, sum(tensor.size_bytes for tensor in tensors.values()))
    matrices = [kinds[name] for name, shape in shapes.items() if len(shape) == 2]
    fields = model_fields(config, matrices, job.out.stem) | model.text.fields(
        model.config.vocab_size
    )
    write_gguf(path, fields, tensors)
    return kinds


def _kind(model: Model, name: str, shape: tuple[int, ...], dtype: str | None) -> str:
    """The type of a tensor in the file. Q4_0 leaves the embedding and the head in Q8_0."""
    kind = model.stored_kind(name)
    if dtype is None or (model.packing is not None and dtype == "Q4_0"):
        return kind_for(kind, shape)
    return kind_for("Q8_0" if dtype == "Q4_0" and name in (EMBEDDING, HEAD) else dtype, shape)


def _loaded(model: Model, name: str, kind: str) -> NumpyArray:
    """A tensor as it lies in the file: the source's own bytes, or rounded to `kind`."""
    source, label = model.source, f"{model.source.path}: {name}"
    model.release(name)
    if model.packing is not None and model.is_rounded(name):
        if kind == "Q4_0":
            rows = q4_0_as_trained(label, source.float32(name), model.packing.block_size)
        else:
            rows = encoded(label, model.read(name), kind)
        return permuted(name, model.config, rows)
    if isinstance(source, GgufFile) and source.stored_type(name) == kind:
        return source.stored(name)
    return permuted(name, model.config, encoded(label, source.source(name).load(), kind))


def write_modelfile(
    place: Place, model: Model, weights: str | None, adapter: str | None = None
) -> None:
    """A Modelfile beside a GGUF file, with the template and the ends that the file has too."""
    rows = model.config.vocab_size
    fields = model.text.fields(rows) if weights is not None else model.text.known_fields(rows)
    pieces = fields.get("tokenizer.ggml.tokens", [])
    keys = (f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom"))
    ends = dict.fromkeys([*(fields[key] for key in keys if key in fields), *model.source.eos_ids])
    stops = [pieces[end] for end in ends if end < len(pieces)]
    text = modelfile(weights, fields.get("tokenizer.chat_template"), stops, adapter=adapter)
    (place.folder / MODELFILE).write_text(text, encoding="utf-8")
