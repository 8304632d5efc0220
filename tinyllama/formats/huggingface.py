"""A Hugging Face LLaMA folder, in and out: names, config.json, safetensors (whole or in shards).

names    parameter names and shapes of a LLaMA, and their check
config   config.json (model_config.py), generation_config.json, the tokenizer's files
read     one safetensors file or shards with an index, opened lazily
write    the same, one tensor at a time
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import (
    BITS,
    FLOATS,
    Array,
    NumpyArray,
    RawArray,
    dtype_name,
)
from tinyllama.formats.model_config import Ids, config_from_hf, config_to_hf, one_or_list
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.formats.safetensors import (
    FileDigest,
    LazyArray,
    SafetensorsFile,
    Source,
    read_header,
    write_safetensors,
)
from tinyllama.system.untrusted import printable, read_json, shown_shape, some_of

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 4_000_000  # 30,000 tensors

Shape = tuple[int, ...]


def llama_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, in the order of the forward pass; weights are [out, in]."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    layer = _layer_shapes(config)
    for number in range(config.num_layers):
        shapes |= {f"model.layers.{number}.{name}": layer[name] for name in layer}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name ("q_proj") -> (out, in) of the linear layers of one layer."""
    return {path.rpartition(".")[2]: shape for path, shape in _linears(config).items()}


def linear_shapes_by_path(config: LlamaConfig) -> dict[str, Shape]:
    """Path ("model.layers.0.self_attn.q_proj") -> (out, in) of those of all layers."""
    linears = _linears(config)
    return {
        f"model.layers.{number}.{name}": shape
        for number in range(config.num_layers)
        for name, shape in linears.items()
    }


def _linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Path within a layer -> (out, in) of its linear layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _layer_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of one layer."""
    norm: Shape = (config.hidden_size,)
    shapes: dict[str, Shape] = {"input_layernorm.weight": norm}
    for path, (outputs, inputs) in _linears(config).items():
        if path == "mlp.gate_proj":
            shapes["post_attention_layernorm.weight"] = norm
        shapes[f"{path}.weight"] = (outputs, inputs)
        if path.rpartition(".")[2] in config.biased:
            shapes[f"{path}.bias"] = (outputs,)
    return shapes


def check_names(
    expected: Mapping[str, Shape], stored: Mapping[str, tuple[str, Shape]], source: str
) -> None:
    """Compare parameters with what a file holds, name by (type, shape).

    Raises WeightsError that names every tensor that is missing, extra, misshapen or not floating.
    """
    problems = [f"{name}: missing" for name in expected if name not in stored]
    problems += [
        f"{printable(name)}: extra, no such parameter" for name in stored if name not in expected
    ]
    for name in expected.keys() & stored.keys():
        dtype, shape = stored[name]
        if shape != expected[name]:
            problems.append(
                f"{name}: shape {shown_shape(shape)}, must be {shown_shape(expected[name])}"
            )
        if dtype not in FLOATS:
            problems.append(f"{name}: type {dtype}, must be one of {', '.join(FLOATS)}")
    if problems:
        raise WeightsError(some_of(problems, source))


def weights_bytes(config: LlamaConfig, dtype: str) -> int:
    """Bytes that a folder's tensors take when stored as `dtype`."""
    values = sum(math.prod(shape) for shape in llama_shapes(config).values())
    return values * BITS[STORED[dtype]] // 8


def generation_config(bos_id: Ids, eos_id: Ids) -> dict[str, Any]:
    """generation_config.json: where `generate` of transformers starts and stops."""
    ids = {"bos_token_id": bos_id, "eos_token_id": one_or_list(eos_id)}
    return {key: value for key, value in ids.items() if value is not None}


def special_ids(folder: Path, values: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """(BOS id, stop ids) of a folder: generation_config.json's, else those of config.json."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    bos, eos = (
        values.get(key) if generation.get(key) is None else generation[key]
        for key in ("bos_token_id", "eos_token_id")
    )
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(stop) is int for stop in stops) or not (bos is None or type(bos) is int):
        got = printable(f"bos_token_id {bos!r}, eos_token_id {eos!r}")
        raise ConfigError(f"{folder}: {got}: must be integers")
    return bos, tuple(stops)


_COMPUTED = ".rotary_emb.inv_freq"  # a table that old folders carry; it follows from rope_theta


class HfFolder:
    """A folder's model: configuration, special tokens, and tensors that are read when used."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise WeightsError(f"{self.path}: not a folder")
        self.entries: Mapping[str, Any] = read_json(self.path / "config.json")
        self.config = config_from_hf(self.entries, str(self.path / "config.json"))
        self.bos_id, self.eos_ids = special_ids(self.path, self.entries)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = self._locate()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._file_of)

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        return {f: [n for n in self.names if self._file_of[n] == f] for f in self._file_of.values()}

    def dtype(self, name: str) -> str:
        """The type a tensor is stored as, such as "BF16"."""
        return self._open(name).dtype(name)

    def shape(self, name: str) -> Shape:
        """A tensor's shape."""
        return self._open(name).shape(name)

    def array(self, name: str) -> NumpyArray:
        """A read-only view of a tensor as it is stored; bfloat16 comes as uint16."""
        return self._open(name).array(name)

    def raw(self, name: str) -> NumpyArray:
        """The elements of a tensor as they are stored, flat."""
        return self.array(name).reshape(-1)

    def rows(self, name: str, rows: slice) -> RawArray:
        """Some rows of a tensor as it is stored."""
        values = self.array(name)[rows]
        return RawArray(self.dtype(name), values.shape, values)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of integers: never here."""
        return False

    def packed_form(self, name: str) -> PackedForm | None:
        """The form of such blocks: none."""
        return None

    def packed(self, name: str, rows: slice) -> PackedRows:
        """Some rows of a tensor that has a `packed_form`. Raises WeightsError: none has."""
        raise WeightsError(f"{self.path}: {name}: is not packed")

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, exactly."""
        return self._open(name).float32(name)

    def source(self, name: str) -> LazyArray:
        """A tensor as `save_folder` takes it, still unread."""
        return self._open(name).source(name)

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages from this process."""
        self._open(name).forget(name)

    def check(self) -> None:
        """Compare names, shapes and types with those of the configuration. Raises WeightsError."""
        # Some writers store the tied head a second time; it may go only if it is the same matrix.
        if self.config.tie_word_embeddings and {HEAD, EMBEDDING} <= self._file_of.keys():
            if np.array_equal(self.array(HEAD), self.array(EMBEDDING)):
                del self._file_of[HEAD]
        if self.config.num_layers > len(self._file_of):  # before a name is made for each layer
            raise WeightsError(
                f"{self.path / 'config.json'}: num_hidden_layers: got {self.config.num_layers}, "
                f"but the files hold {len(self._file_of)} tensors"
            )
        stored = {name: (self.dtype(name), self.shape(name)) for name in self._file_of}
        check_names(llama_shapes(self.config), stored, str(self.path))

    def _locate(self) -> dict[str, str]:
        """Name of the file that holds each tensor."""
        if os.path.lexists(self.path / WEIGHTS):
            file_of = dict.fromkeys(_names_in(self.path / WEIGHTS) or (), WEIGHTS)
        elif (self.path / INDEX).exists():
            file_of = self._read_index()
        else:
            raise WeightsError(f"{self.path}: {_what_is_there(self.path)}")
        return {name: file for name, file in file_of.items() if not name.endswith(_COMPUTED)}

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX
        index = read_json(path, most=_MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(index, dict) or not all(_is_plain(file) for file in index.values()):
            raise WeightsError(f"{path}: weight_map: must map names to files of this folder")
        held = {file: _names_in(self.path / file) for file in sorted(set(index.values()))}
        problems = [f"{printable(f)}: missing" for f, names in held.items() if names is None]
        for name, file in index.items():
            names = held[file]
            if names is not None and name not in names:
                problems.append(f"{printable(name)}: not in {printable(file)}")
        if problems:
            raise WeightsError(some_of(problems, path))
        # A shard may hold what the index forgot: kept, so that `check` reports it as extra.
        return {name: file for file, names in held.items() for name in names or ()} | index

    def _open(self, name: str) -> SafetensorsFile:
        file = self._file_of.get(name)
        if file is None:
            raise WeightsError(f"{self.path}: {name}: no such tensor")
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.path / file)
        return self._files[file]


def open_folder(folder: str | os.PathLike[str]) -> HfFolder:
    """Open a folder whose tensors are exactly those that its config.json implies.

    Only headers are read. Raises ConfigError (config.json) and WeightsError.
    """
    opened = HfFolder(folder)
    opened.check()
    return opened


def _names_in(file: Path) -> tuple[str, ...] | None:
    """Names of a file's tensors, or None where there is no such file."""
    return tuple(read_header(file).tensors) if os.path.lexists(file) else None


def _is_plain(file: object) -> bool:
    """Whether an index names a file of its own folder, not one elsewhere."""
    return isinstance(file, str) and file == os.path.basename(file) and file not in ("", ".", "..")


def _what_is_there(folder: Path) -> str:
    """Why a folder without the two files is of no use, with what it holds instead."""
    if (folder / "adapter_model.safetensors").exists():
        return f"holds an adapter (adapter_model.safetensors), not a model: no {WEIGHTS}"
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        return f"holds {pickles[0]}, a pickle, which can run code and is never read: no {WEIGHTS}"
    return f"neither {WEIGHTS} nor {INDEX}"


def save_folder(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    tensors: Mapping[str, Source],
    *,
    dtype: str,
    files: Mapping[str, bytes],
    bos_id: int | None,
    eos_id: Ids,
    base: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, FileDigest]:
    """Fill a folder that transformers loads; returns the digests of the files, for a manifest.

    `dtype` ("float32", "bfloat16", "float16") is what is stored, whatever floats the sources
    give; each source is loaded once, when its turn comes. `base` is the config.json of the model
    that this one began as: what it says and is still true is kept. `files` are the tokenizer's, by
    name. Not atomic by itself: hand it the folder of `save_checkpoint` or `atomic_directory`.
    Raises WeightsError, also where the folder holds weights already (stale shards would be loaded
    with the new ones), and OSError.
    """
    folder = Path(folder)
    if dtype not in STORED:
        raise WeightsError(f"{folder}: dtype: got {dtype!r}, must be one of {', '.join(STORED)}")
    lazy = _stored_as(STORED[dtype], llama_shapes(config), tensors, str(folder))
    documents: dict[str, Mapping[str, Any]] = {
        "config.json": config_to_hf(config, bos_id, eos_id, dtype, base),
    }
    if "generation_config.json" not in files:
        documents["generation_config.json"] = generation_config(bos_id, eos_id)
    _refuse_clashes(folder, files, documents)
    folder.mkdir(parents=True, exist_ok=True)
    digests = {name: _write_file(folder / name, data) for name, data in files.items()}
    digests |= {name: _write_json(folder / name, value) for name, value in documents.items()}
    return digests | _write_weights(folder, lazy, max_shard_bytes)


def _stored_as(
    stored: str, expected: Mapping[str, Shape], tensors: Mapping[str, Source], label: str
) -> dict[str, LazyArray]:
    """Sources with the type to store and the shape to find, in the order of the model."""
    given: dict[str, tuple[str, Shape]] = {}
    for name, source in tensors.items():
        if isinstance(source, np.ndarray | RawArray):
            given[name] = (dtype_name(name, source), tuple(source.shape))
        elif isinstance(source, LazyArray):
            given[name] = (source.dtype, source.shape)
        else:  # a callable is not called yet: its result is checked when it is written
            given[name] = (stored, expected.get(name, ()))
    check_names(expected, given, label)
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
