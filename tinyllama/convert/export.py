"""Models and adapters for other programs: Hugging Face's, llama.cpp and Ollama, mlx-lm.

    hf      a folder that transformers, PEFT and this package load
    gguf    one file (F32, F16, BF16, Q8_0, Q4_0) with its tokenizer, and a Modelfile for Ollama;
            of an adapter a LoRA file, of its base the very blocks that it was trained on
    mlx     a folder that mlx-lm loads

A tensor is written at a time, beside the place where the export will be. It is read back, compared
with its source (check.py), and only then given its name: there is never half an export, or a wrong
one. Blocks of a GGUF source stay as they are unless another type is chosen.
"""

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinyllama.config import LlamaConfig
from tinyllama.convert.check import TEXT, TOKENS, Check, Matrix, Read, compare
from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError, TokenizerError, WeightsError
from tinyllama.formats import mlx
from tinyllama.formats.dtypes import BITS, FLOATS, RawArray, convert, to_float32
from tinyllama.formats.gguf import SUFFIX, GgufFile
from tinyllama.formats.gguf_writer import (
    GgufTensor,
    adapter_fields,
    adapter_tensors,
    as_trained_problem,
    encoded,
    gguf_name,
    kind_for,
    model_fields,
    permuted,
    q4_0_as_trained,
    read_adapter,
    rope_factors,
    write_gguf,
)
from tinyllama.formats.huggingface import (
    EMBEDDING,
    HEAD,
    STORED,
    linear_shapes_by_path,
    llama_shapes,
    save_folder,
)
from tinyllama.formats.int4 import Packing, as_packed
from tinyllama.formats.modelfile import NAME as MODELFILE
from tinyllama.formats.modelfile import modelfile
from tinyllama.formats.models import ModelSource, open_model
from tinyllama.formats.peft import (
    PARTS,
    AdapterConfig,
    AdapterFolder,
    is_adapter,
    open_adapter,
    save_adapter,
)
from tinyllama.system.files import atomic_directory, fsync_path, remove_partials
from tinyllama.system.partials import unfinished
from tinyllama.tokenizers.opening import holds_tokenizer, open_tokenizer
from tinyllama.tokenizers.to_gguf import vocabulary_fields
from tinyllama.tokenizers.tokenizer import Tokenizer

Target = Literal["hf", "gguf", "mlx"]
# Names of types -> the formats' own.
KINDS = STORED | {"q8_0": "Q8_0", "q4_0": "Q4_0"}

MODEL_GGUF, ADAPTER_GGUF = f"model{SUFFIX}", f"adapter{SUFFIX}"
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


def export(job: Job) -> Exported:
    """Write one export. Raises ConfigError, TokenizerError and WeightsError, and then leaves
    nothing behind."""
    _check_options(job)
    try:
        with _placing(job.out) as place:
            return _write(job, place)
    except OSError as error:
        name = error.filename or job.out
        raise WeightsError(f"{name}: cannot be written: {error.strerror or error}") from error


def _check_options(job: Job) -> None:
    """Refuse what does not fit together, before anything is read."""
    adapter = is_adapter(job.source)
    if os.path.lexists(job.out):
        raise WeightsError(f"{job.out}: exists already: name a new one")
    if job.dtype is not None and job.dtype not in FLOATS and job.target != "gguf":
        raise ConfigError(
            f"--dtype: got {job.dtype.lower()}, must be float32, float16 or bfloat16: only "
            "--to gguf has quantised types"
        )
    if not adapter and (given := _options_of_adapters(job)):
        raise ConfigError(f"{given}: must be left out: {job.source} holds a whole model")
    if job.with_base and (job.merged or job.target != "gguf"):
        raise ConfigError("--with-base: goes with --to gguf, and without --merged")
    alone = adapter and not job.merged and not job.with_base
    if alone and job.dtype is not None and job.dtype not in FLOATS:
        raise ConfigError(
            f"--dtype: got {job.dtype.lower()}, must be float32, float16 or bfloat16 for an "
            "adapter alone: type --with-base to write its base too, or --merged"
        )
    if job.target != "gguf" and job.out.suffix == SUFFIX:
        raise ConfigError(f"{job.out}: is the name of a GGUF file: type --to gguf")
    if job.with_base and job.out.suffix == SUFFIX:
        raise ConfigError(f"{job.out}: must be a folder with --with-base, which writes two files")


def _options_of_adapters(job: Job) -> str:
    given = {"--base": job.base is not None, "--merged": job.merged, "--with-base": job.with_base}
    return ", ".join(option for option, is_given in given.items() if is_given)


# ---- where it goes


class _Place(NamedTuple):
    """A folder to fill. Of an export that is one file, `file` is its name there."""

    folder: Path
    file: str | None

    def gguf(self, name: str) -> Path:
        """Where a GGUF file goes whose name in an exported folder is `name`."""
        return self.folder / (self.file or name)


@contextmanager
def _placing(out: Path) -> Iterator[_Place]:
    """Give what was written its name when the block ends without error."""
    if out.parent.is_dir():
        remove_partials(out.parent)  # of exports that were killed
    if out.suffix != SUFFIX:
        with atomic_directory(out) as folder:
            yield _Place(folder, None)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(out, Path.mkdir) as folder:
        try:
            yield _Place(folder, out.name)
            beside = _modelfile_path(out)
            for path in folder.iterdir():
                fsync_path(path)
            os.rename(folder / MODELFILE, beside)
            os.rename(folder / out.name, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    fsync_path(out.parent)


def _modelfile_path(out: Path) -> Path:
    """Where the Modelfile of a single GGUF file goes: `Modelfile`, or a name of its own where
    there is one already. Raises WeightsError."""
    for path in (out.with_name(MODELFILE), out.with_suffix(f".{MODELFILE}")):
        if not os.path.lexists(path):
            return path
    raise WeightsError(f"{path}: exists already: name another file or folder")


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + _SPARE_BYTES:
        raise WeightsError(
            f"{folder.parent}: {free_bytes:,} bytes are free, the export takes {needed_bytes:,}"
        )


def _finished(job: Job, place: _Place, kind: str, check: Check, notes: Sequence[str]) -> Exported:
    paths = sorted(place.folder.iterdir(), key=lambda path: -path.stat().st_size)
    if place.file is None:
        files = [job.out / path.name for path in paths]
    else:
        files = [job.out, _modelfile_path(job.out)]
    size_bytes = sum(path.stat().st_size for path in paths)
    return Exported(tuple(files), size_bytes, kind, check, tuple(notes))


# ---- what is exported


@dataclass(frozen=True)
class _Model:
    """A model to write, its tokenizer, and how it is packed if an adapter was trained on it so."""

    source: ModelSource
    text: "_Text"
    packing: Packing | None = None

    @property
    def config(self) -> LlamaConfig:
        return self.source.config

    def read(self, name: str) -> Matrix:
        """A tensor in float32, as it is to be computed with."""
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


def _write(job: Job, place: _Place) -> Exported:
    if not is_adapter(job.source):
        source = open_model(job.source)
        model = _Model(source, _text_of(job.source, source))
        return _write_model(job, place, model, model.read)
    adapter, base = open_adapter(job.source, job.base)
    config = adapter.config(base.config)
    text = _text_of(job.source, base)
    if job.merged:
        return _write_merged(job, place, adapter, config, base, text)
    trained = _Adapter(adapter, config, _Model(base, text, _packing(config)))
    return _write_adapter(job, place, trained)


def _write_model(job: Job, place: _Place, model: _Model, original: Read) -> Exported:
    """Write and check a whole model; `original` gives the values that it must have."""
    if job.target == "gguf":
        path = place.gguf(MODEL_GGUF)
        kinds = _write_gguf_model(path, job, model)
        _write_modelfile(place, model, path.name)
        model.text.check(path)
        read_back: ModelSource = GgufFile(path)
    else:
        kinds = _write_folder(place.folder, job, model)
        read_back = open_model(place.folder)
    check = _compare(job, model, original, read_back, kinds)
    return _finished(job, place, _most(kinds), check, _notes(model, kinds))


def _compare(
    job: Job, model: _Model, original: Read, read_back: ModelSource, kinds: Mapping[str, str]
) -> Check:
    return compare(
        (model.config, original),
        (read_back.config, read_back.float32),
        lambda name: "F32" if kinds[name] == model.stored_kind(name) else kinds[name],
        model.text.sample(model.config),
        str(job.out),
    )


def _most(kinds: Mapping[str, str]) -> str:
    values = [kind for kind in kinds.values() if kind != "F32"] or ["F32"]
    return max(values, key=values.count)


def _notes(model: _Model, kinds: Mapping[str, str]) -> list[str]:
    notes = []
    window, length = model.config.sliding_window, model.config.max_seq_len
    if window is not None and window < length:
        notes.append(f"llama.cpp has no sliding window here: the context is {window}, not {length}")
    chosen = set(kinds.values()) & {"Q8_0", "Q4_0"}
    if chosen and (other := [n for n, kind in kinds.items() if kind == "F16"]):
        notes.append(f"{len(other)} tensors are F16: their rows are no multiple of 32")
    return notes


# ---- Hugging Face and MLX


def _write_folder(folder: Path, job: Job, model: _Model) -> dict[str, str]:
    """Write a folder that transformers and mlx-lm load; returns the type of each tensor."""
    shapes = llama_shapes(model.config)
    kind = job.dtype or _common_float([model.source.dtype(name) for name in shapes])
    _check_room(folder, sum(map(math.prod, shapes.values())) * BITS[kind] // 8)
    save_folder(
        folder,
        model.config,
        {name: partial(_released, model, name) for name in shapes},
        dtype={form: name for name, form in STORED.items()}[kind],
        files=model.text.files,
        bos_id=model.source.bos_id,
        eos_id=model.source.eos_ids,
        base=model.source.entries,
    )
    return dict.fromkeys(shapes, kind)


def _released(model: _Model, name: str) -> Any:
    """A tensor as it is stored, whose predecessor's memory is given back."""
    return model.source.source(name).load()


def _common_float(kinds: Sequence[str]) -> str:
    """The type that holds the values of all of these exactly."""
    return kinds[0] if len(set(kinds)) == 1 else "F32"


# ---- GGUF


def _write_gguf_model(path: Path, job: Job, model: _Model) -> dict[str, str]:
    """Write a model as one file; returns the type of each tensor by Hugging Face's name."""
    config = model.config
    shapes = llama_shapes(config)
    kinds = {name: _kind(model, name, shape, job.dtype) for name, shape in shapes.items()}
    tensors = {
        gguf_name(name): GgufTensor(kind, shapes[name], partial(_loaded, model, name, kind))
        for name, kind in kinds.items()
    } | rope_factors(config)
    _check_room(path.parent, sum(tensor.size_bytes for tensor in tensors.values()))
    matrices = [kinds[name] for name, shape in shapes.items() if len(shape) == 2]
    fields = model_fields(config, matrices, job.out.stem) | model.text.fields(
        model.config.vocab_size
    )
    write_gguf(path, fields, tensors)
    return kinds


def _kind(model: _Model, name: str, shape: tuple[int, ...], dtype: str | None) -> str:
    """The type of a tensor in the file. Q4_0 leaves the embedding and the head in Q8_0."""
    kind = model.stored_kind(name)
    if dtype is None or (model.packing is not None and dtype == "Q4_0"):
        return kind_for(kind, shape)
    return kind_for("Q8_0" if dtype == "Q4_0" and name in (EMBEDDING, HEAD) else dtype, shape)


def _loaded(model: _Model, name: str, kind: str) -> np.ndarray:
    """A tensor as it lies in the file: the source's own bytes, or rounded to `kind`."""
    source, label = model.source, f"{model.source.path}: {name}"
    if model.packing is not None and model.is_rounded(name):
        if kind == "Q4_0":
            rows = q4_0_as_trained(label, source.float32(name), model.packing.block_size)
        else:
            rows = encoded(label, model.read(name), kind)
        return permuted(name, model.config, rows)
    if isinstance(source, GgufFile) and source.stored_type(name) == kind:
        return source.stored(name)
    return permuted(name, model.config, encoded(label, source.source(name).load(), kind))


def _write_modelfile(
    place: _Place, model: _Model, weights: str | None, adapter: str | None = None
) -> None:
    """A Modelfile beside a GGUF file, with the template and the ends that the file has too."""
    fields = model.text.fields(model.config.vocab_size)
    keys = (f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom"))
    ends = dict.fromkeys([*(fields[key] for key in keys if key in fields), *model.source.eos_ids])
    stops = [fields["tokenizer.ggml.tokens"][end] for end in ends]
    text = modelfile(weights, fields.get("tokenizer.chat_template"), stops, adapter=adapter)
    (place.folder / MODELFILE).write_text(text, encoding="utf-8")


# ---- adapters


@dataclass(frozen=True)
class _Adapter:
    """An adapter on its base, in the form that it was trained on."""

    folder: AdapterFolder
    config: AdapterConfig
    base: _Model

    def low(self, path: str) -> tuple[Matrix, Matrix, float]:
        """A (r, in), B (out, r) and scale of a layer."""
        a, b = (self.folder.matrix(path, part) for part in PARTS)
        return a, b, self.config.scale(path)

    def read(self, name: str) -> Matrix:
        """A tensor of the model that base and adapter are together."""
        return _with_low(self.config, self.base.read, self.low, name)


def _packing(config: AdapterConfig) -> Packing | None:
    """How the base was held in training; None if it was not packed."""
    return None if config.block_size is None else Packing(config.block_size, config.requantize)


def _with_low(
    config: AdapterConfig,
    read: Read,
    low: Callable[[str], tuple[Matrix, Matrix, float]],
    name: str,
) -> Matrix:
    path = name.removesuffix(".weight")
    if path not in config.placed or not name.endswith(".weight"):
        return read(name)
    a, b, scale = low(path)
    delta = np.matmul(b * np.float32(scale), a, dtype=np.float32)
    merged: Matrix = read(name) + delta
    return merged


def _write_merged(
    job: Job,
    place: _Place,
    adapter: AdapterFolder,
    config: AdapterConfig,
    base: ModelSource,
    text: "_Text",
) -> Exported:
    """Write base and adapter as one model, by way of a merged folder in float32."""
    shapes = llama_shapes(base.config)
    _check_room(place.folder, 4 * sum(map(math.prod, shapes.values())))
    merged = place.folder.with_name(f"{place.folder.name}.merged")
    trained = _Adapter(adapter, config, _Model(base, text, _packing(config)))
    dtype = job.dtype or _common_float([base.dtype(name) for name in shapes])
    job = Job(**{**vars(job), "dtype": dtype})
    try:
        merge(base.path, [(adapter.path, 1.0)], merged, dtype="fp32")
        return _write_model(job, place, _Model(open_model(merged), text), trained.read)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _write_adapter(job: Job, place: _Place, adapter: _Adapter) -> Exported:
    """Write an adapter in its target's form, with its base beside it if that is chosen."""
    kind = job.dtype if job.dtype in FLOATS and not job.with_base else "F32"
    assert kind is not None
    model = adapter.base
    back: Read = model.read
    kinds = dict.fromkeys(llama_shapes(model.config), kind)
    if job.with_base:
        path = place.folder / MODEL_GGUF
        if problem := model.packing and as_trained_problem(model.packing.block_size):
            raise ConfigError(f"{job.source}: {problem}: type --merged instead")
        kinds = _write_gguf_model(path, job, model)
        back = GgufFile(path).float32
    low = {"gguf": _write_lora_gguf, "mlx": _write_lora_mlx, "hf": _write_lora_peft}[job.target](
        job, place, adapter, kind
    )
    check = compare(
        (model.config, adapter.read),
        (model.config, partial(_with_low, adapter.config, back, low)),
        lambda name: "F32" if kinds[name] == model.stored_kind(name) else kinds[name],
        model.text.sample(model.config),
        str(job.out),
    )
    return _finished(job, place, kind, check, [])


Low = Callable[[str], tuple[Matrix, Matrix, float]]


def _write_lora_gguf(job: Job, place: _Place, adapter: _Adapter, kind: str) -> Low:
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
    _check_room(place.folder, sum(tensor.size_bytes for tensor in tensors.values()))
    write_gguf(path, adapter_fields(job.out.stem, alpha), tensors)
    _write_modelfile(place, adapter.base, MODEL_GGUF if job.with_base else None, path.name)
    return read_adapter(path, config)


def _write_lora_mlx(job: Job, place: _Place, adapter: _Adapter, kind: str) -> Low:
    config = adapter.base.config
    shapes = {path: (out, into) for path, (out, into) in linear_shapes_by_path(config).items()}
    mlx.write_adapter(place.folder, adapter.config, shapes, adapter.low, config.num_layers, kind)
    return mlx.adapter_loader(place.folder)


def _write_lora_peft(job: Job, place: _Place, adapter: _Adapter, kind: str) -> Low:
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
    return _Adapter(written, written.config(adapter.base.config), adapter.base).low


def _rounded(folder: AdapterFolder, path: str, part: str, kind: str) -> RawArray:
    values = folder.matrix(path, part)
    return RawArray(kind, values.shape, convert(f"{path}.{part}", values, kind))


# ---- tokenizers


@dataclass(frozen=True)
class _Text:
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


def _text_of(path: Path, source: ModelSource) -> _Text:
    """The tokenizer in an adapter's folder, or else in its base's."""
    place = path if path.is_dir() and holds_tokenizer(path) else source.path
    if not isinstance(source, GgufFile) or place != source.path:
        tokenizer = open_tokenizer(place) if holds_tokenizer(place) else None
        return _Text(tokenizer, {}, str(place))
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in source.metadata.items()
        if key.startswith("tokenizer.")
    }
    is_whole = "tokenizer.ggml.model" in metadata
    return _Text(open_tokenizer(place) if is_whole else None, metadata, str(place))
