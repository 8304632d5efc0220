"""GGUF files of LLaMA models, read through a memory map: header, metadata, tensors when used.

    magic "GGUF", version, tensor count, metadata count     little endian, versions 2 and 3
    metadata      key, type, value; a value may be an array
    tensor infos  name, dimensions (fastest first), type, offset into the data
    data          from the next multiple of general.alignment on

Names become Hugging Face's, and the rows of q and k return from rotating pairs (2i, 2i + 1) to
halves (i, i + head_dim / 2). Every number of the file is compared with the file's size before it is
used. Source: docs/gguf.md of the ggml project.
"""

import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import WeightsError, reason
from tinyllama.formats.dtypes import NUMPY, Array, NumpyArray, RawArray, to_float32
from tinyllama.formats.gguf_blocks import (
    BLOCK_TYPES,
    PACKED_TYPES,
    packed_rows,
    widen,
)
from tinyllama.formats.huggingface import WEIGHTS, Shape, check_names, llama_shapes
from tinyllama.formats.model_config import config_from_hf
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.formats.safetensors import LazyArray
from tinyllama.system.untrusted import printable, what_it_is

SUFFIX = ".gguf"
# The largest real headers (a vocabulary of 256 thousand pieces with merges) take 15 MB.
MAX_HEADER_BYTES = 1 << 26
MAX_ENTRIES = 1 << 16  # metadata, and tensors
MAX_STRINGS = 1 << 20  # in all arrays together
_MAX_DIMENSIONS = 4
_SHOWN_CHARACTERS = 400

_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}
_TYPES = _FLOATS | {block.number: name for name, block in BLOCK_TYPES.items()}
# Of metadata: number -> numpy's name.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class TensorInfo(NamedTuple):
    """A tensor of a file: `kind` is GGUF's type; `offset` counts from the file's first byte."""

    kind: str
    shape: Shape
    offset: int
    size_bytes: int


class _Part:
    """One file: metadata (arrays of numbers as numpy arrays) and tensors by GGUF's names."""

    def __init__(self, path: Path) -> None:
        self.path, self.map = path, _mapped(path)
        self._at, self._strings = 0, 0
        self._end = min(len(self.map), MAX_HEADER_BYTES)
        tensors = self._read_start()
        count = self._count("metadata", MAX_ENTRIES)
        self.metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("a key of the metadata")
            if key in self.metadata:
                self.fail(f"{key}: twice in the metadata")
            self.metadata[key] = self._value(key)
        infos = self._read_infos(tensors)
        self.tensors = self._placed(infos)

    def fail(self, problem: str) -> NoReturn:
        """Raise WeightsError with what is wrong: one short line, whatever the file holds."""
        raise WeightsError(f"{self.path}: {printable(problem, _SHOWN_CHARACTERS)}")

    def _read_start(self) -> int:
        """Magic and version; returns the number of tensors."""
        magic = self._bytes(4, "the magic")
        if magic != b"GGUF":
            self.fail(_not_gguf(self.map[:512]))
        version = self._number("<I", "the version")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            found = "a big-endian file" if swapped else f"version {version}"
            self.fail(f"{found}; versions 2 and 3 in little endian can be read")
        return self._count("tensors", MAX_ENTRIES)

    def _bytes(self, count: int, what: str) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._end:
            if self._end == len(self.map):
                self.fail(f"truncated or damaged: {what} ends after the last byte, {self._end}")
            self.fail(f"damaged: {what} ends after byte {self._end}, where every header has ended")
        return self.map[start : self._at]

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]

    def _count(self, what: str, limit: int) -> int:
        count: int = self._number("<Q", f"the number of {what}")
        if count > limit:
            self.fail(f"damaged: {count} {what}, at most {limit} can be read")
        return count

    def _string(self, what: str) -> str:
        try:
            return self._bytes(self._number("<Q", what), what).decode()
        except UnicodeDecodeError:
            self.fail(f"damaged: {what} is not UTF-8")

    def _value(self, key: str) -> Any:
        kind = self._number("<I", key)
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self.fail(f"{key}: damaged: no metadata has type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(dtype.itemsize, key), dtype)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._number("<I", key), self._number("<Q", key)
        if kind == _STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                self.fail(f"{key}: damaged: {count} strings, at most {MAX_STRINGS} can be read")
            return [self._string(key) for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(f"{key}: damaged: no array has elements of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype)

    def _read_infos(self, count: int) -> dict[str, tuple[str, Shape, int]]:
        """Name -> (type, shape as numpy counts it, offset into the data)."""
        infos: dict[str, tuple[str, Shape, int]] = {}
        for _ in range(count):
            name = self._string("the name of a tensor")
            if name in infos:
                self.fail(f"{name}: twice in the file")
            rank = self._number("<I", name)
            if not 1 <= rank <= _MAX_DIMENSIONS:
                self.fail(f"{name}: damaged: {rank} dimensions")
            shape = tuple(self._number("<Q", name) for _ in range(rank))[::-1]
            number, offset = self._number("<I", name), self._number("<Q", name)
            if number not in _TYPES:
                self.fail(f"{name}: type {_other_type(number)}, must be one of {_type_names()}")
            infos[name] = _TYPES[number], shape, offset
        return infos

    def _placed(self, infos: Mapping[str, tuple[str, Shape, int]]) -> dict[str, TensorInfo]:
        """The tensors with their places in the file, which must not overlap."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"general.alignment: got {alignment!r}, must be a power of two")
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: self._checked(name, kind, shape, offset, start, alignment)
            for name, (kind, shape, offset) in infos.items()
        }
        end, before = start, ""
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                self.fail(f"{name}: damaged: overlaps with {before}")
            end, before = info.offset + info.size_bytes, name
        return tensors

    def _checked(
        self, name: str, kind: str, shape: Shape, offset: int, start: int, alignment: int
    ) -> TensorInfo:
        values = 1 if kind in _FLOATS.values() else BLOCK_TYPES[kind].values
        if shape[-1] % values:
            self.fail(f"{name}: damaged: rows of {shape[-1]}, but blocks of {kind} hold {values}")
        if offset % alignment:
            self.fail(f"{name}: damaged: offset {offset} is no multiple of {alignment}")
        size_bytes = math.prod(shape) // values * _unit_bytes(kind)
        if start + offset + size_bytes > len(self.map):
            self.fail(
                f"{name}: truncated or damaged: {kind} of shape {shape} ends at byte "
                f"{start + offset + size_bytes} of {len(self.map)}"
            )
        return TensorInfo(kind, shape, start + offset, size_bytes)


class _Placed(NamedTuple):
    """Where a tensor of the model lies, and how its rows return to Hugging Face's order."""

    part: _Part
    info: TensorInfo
    heads: int | None  # whose rows were permuted


class GgufFile:
    """A GGUF file's model: configuration, special tokens, and tensors that are read when used.

    It is a ModelSource (models.py); quantised tensors appear as F32. `metadata` is that of the
    file: str, int, float, bool, lists of str and numpy arrays by GGUF's keys; `entries` is the
    config.json that says the same. Raises WeightsError and ConfigError, naming the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        first = _Part(self.path)
        self.metadata: Mapping[str, Any] = first.metadata
        parts = [first, *_others(first)]
        held: dict[str, tuple[_Part, TensorInfo]] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in held:
                    part.fail(f"{name}: also in {held[name][0].path.name}")
                held[name] = part, info
        self.entries: Mapping[str, Any] = _hf_values(first, held)
        self.config = config_from_hf(self.entries, str(self.path))
        self.bos_id, self.eos_ids = _special_ids(first)
        self._tensors = {
            _hf_name(name): _Placed(*place, _permuted_heads(name, self.config))
            for name, place in held.items()
            if name != _ROPE_FACTORS
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._tensors)

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each safetensors file that a copy of the model is to have."""
        return {WEIGHTS: list(self._tensors)}

    def dtype(self, name: str) -> str:
        """The type of `array`: "F32" for quantised tensors, else as stored."""
        kind = self.stored_type(name)
        return kind if kind in _FLOATS.values() else "F32"

    def stored_type(self, name: str) -> str:
        """GGUF's type of a tensor, such as "Q4_1"."""
        return self._place(name).info.kind

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of integers with scales."""
        return self.stored_type(name) in BLOCK_TYPES

    def packed_form(self, name: str) -> PackedForm | None:
        """The form of those blocks, if `packed` gives them."""
        return PACKED_TYPES.get(self.stored_type(name))

    def shape(self, name: str) -> Shape:
        """A tensor's shape."""
        return self._place(name).info.shape

    def array(self, name: str) -> NumpyArray:
        """A tensor as numpy holds its `dtype` (bfloat16 as uint16): a view or, if quantised or
        permuted, a new array."""
        return self.rows(name, slice(None)).data

    def raw(self, name: str) -> NumpyArray:
        """The bytes of a tensor, in the file's order."""
        part, info, _ = self._place(name)
        return np.frombuffer(part.map, np.uint8, info.size_bytes, info.offset)

    def rows(self, name: str, rows: slice) -> RawArray:
        """Some rows of a tensor."""
        place = self._place(name)
        raw = self._raw_rows(name, rows)
        kind, shape = place.info.kind, (len(raw), *place.info.shape[1:])
        if kind in BLOCK_TYPES:
            return RawArray("F32", shape, widen(kind, raw).reshape(shape))
        values = np.ascontiguousarray(raw).view(NUMPY[kind])
        return RawArray(kind, shape, values.reshape(shape))

    def packed(self, name: str, rows: slice) -> PackedRows:
        """Some rows of a tensor that has a `packed_form`; only the order of nibbles is changed."""
        place = self._place(name)
        return packed_rows(place.info.kind, self._raw_rows(name, rows))

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor as they lie in the file, in GGUF's order of rows."""
        part, info, _ = self._place(name)
        return np.frombuffer(part.map, np.uint8, info.size_bytes, info.offset)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, exactly."""
        return to_float32(name, self.rows(name, slice(None)))

    def source(self, name: str) -> LazyArray:
        """A tensor as `save_folder` takes it, still unread."""

        def load() -> Array:
            return self.rows(name, slice(None))

        return LazyArray(self.dtype(name), self.shape(name), load)

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages from this process; they return when read."""
        part, info, _ = self._place(name)
        start = info.offset - info.offset % mmap.PAGESIZE
        if info.size_bytes and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no madvise
            part.map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.size_bytes - start)

    def check(self) -> None:
        """Compare names and shapes with those of the configuration. Raises WeightsError."""
        stored = {name: (self.dtype(name), self.shape(name)) for name in self._tensors}
        check_names(llama_shapes(self.config), stored, str(self.path))

    def _place(self, name: str) -> _Placed:
        if name not in self._tensors:
            raise WeightsError(f"{self.path}: {name}: no such tensor")
        return self._tensors[name]

    def _raw_rows(self, name: str, rows: slice) -> npt.NDArray[np.uint8]:
        """The bytes of some rows (n, bytes per row), in Hugging Face's order."""
        _, info, heads = self._place(name)
        flat = self.raw(name)
        raw = flat.reshape(info.shape[0], -1) if info.size_bytes else flat.reshape(0, 1)
        return raw[rows] if heads is None else raw[_half_order(len(raw), heads)[rows]]


def read_metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """A file's metadata, also of one that holds only a vocabulary. Raises WeightsError."""
    return _Part(Path(path)).metadata


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a file whose tensors are exactly those that its metadata imply.

    Only the header is read. Raises ConfigError and WeightsError.
    """
    opened = GgufFile(path)
    opened.check()
    return opened


# ---- the file


def _mapped(path: Path) -> mmap.mmap:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"{path}: not a file")
        if not status.st_size:
            raise WeightsError(f"{path}: empty")
        with open(path, "rb") as file:
            # The map lives as long as the last array that looks into it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {reason(error)}") from error


def _not_gguf(start: bytes) -> str:
    """What a file is that does not begin like GGUF."""
    if what := what_it_is(start):
        return what
    return f"begins with {start[:4]!r}, must begin with {b'GGUF'!r}: not a GGUF file"


def _others(first: _Part) -> list[_Part]:
    """The other files of a model in shards, of which the first was given."""
    count, number = (first.metadata.get(f"split.{key}", 0) for key in ("count", "no"))
    if not isinstance(count, int) or not isinstance(number, int) or count > MAX_ENTRIES:
        first.fail(f"split.count, split.no: got {count!r}, {number!r}, must be small integers")
    if count < 2:
        return []
    ending = f"-{number + 1:05d}-of-{count:05d}{SUFFIX}"
    if not first.path.name.endswith(ending):
        first.fail(f"is shard {number + 1} of {count}: its name must end in {ending}")
    names = [
        f"{first.path.name.removesuffix(ending)}-{shard:05d}-of-{count:05d}{SUFFIX}"
        for shard in range(1, count + 1)
    ]
    if number:
        first.fail(f"is shard {number + 1} of {count}: open the first, {names[0]}")
    # Checked before any is opened, because `count` is the file's word.
    for name in names:
        if not (first.path.parent / name).is_file():
            first.fail(f"{name}, another of its {count} shards, is missing")
    return [_Part(first.path.parent / name) for name in names[1:]]


def _unit_bytes(kind: str) -> int:
    """Bytes of a block, or of a value of a type that has no blocks."""
    return (
        BLOCK_TYPES[kind].memory.itemsize if kind in BLOCK_TYPES else np.dtype(NUMPY[kind]).itemsize
    )


def _type_names() -> str:
    return ", ".join(_TYPES[number] for number in sorted(_TYPES))


def _other_type(number: int) -> str:
    """GGUF's name of a type that cannot be read, or its number."""
    names = {10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"}
    names |= {19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M"}
    names |= {28: "F64", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
    return names.get(number, str(number))


# ---- the model


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; a name that no LLaMA has stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if layer is None or layer[2] not in LAYER_NAMES:
        return name
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}"


def _permuted_heads(name: str, config: LlamaConfig) -> int | None:
    """Of a tensor whose rows rotate as pairs (2i, 2i + 1)."""
    heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}
    return heads.get(name.split(".")[-2]) if name.startswith("blk.") else None


def _half_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Which row of GGUF each row of Hugging Face is."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _field(part: _Part, key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
    value = part.metadata.get(key, default)
    if value is default or (isinstance(value, kinds) and type(value) is not bool):
        return value
    found = "an array" if isinstance(value, list | np.ndarray) else repr(value)
    part.fail(f"{key}: got {found}, must be {' or '.join(kind.__name__ for kind in kinds)}")


_INTEGERS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "sliding_window": "attention.sliding_window",
}


def _hf_values(part: _Part, held: Mapping[str, tuple[_Part, TensorInfo]]) -> dict[str, Any]:
    """config.json, as Hugging Face would write it for this model."""
    architecture = part.metadata.get("general.architecture")
    if part.metadata.get("general.type", "model") != "model":
        part.fail(f"general.type: got {part.metadata['general.type']!r}, must be 'model'")
    if architecture != "llama":
        part.fail(f"general.architecture: got {architecture!r}, must be 'llama'")
    values = {ours: _field(part, f"llama.{key}", (int,)) for ours, key in _INTEGERS.items()}
    if (experts := _field(part, "llama.expert_count", (int,), 0)) > 0:
        part.fail(f"llama.expert_count: got {experts}, must be 0: no mixture can be computed")
    layers = values["num_hidden_layers"]
    if layers is not None and layers > len(held):
        part.fail(f"llama.block_count: got {layers}, but the file has {len(held)} tensors")
    embedding = held.get("token_embd.weight")
    if embedding is None:
        part.fail("token_embd.weight: missing")
    values |= {
        "model_type": _model_type(held, values),
        "vocab_size": embedding[1].shape[0],
        "rms_norm_eps": _shortest(part, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _shortest(part, "rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in held,
        "attention_bias": "blk.0.attn_q.bias" in held,
        "mlp_bias": "blk.0.ffn_gate.bias" in held,
    }
    values["head_dim"] = _head_dim(part, values)
    values["rope_scaling"] = _rope_scaling(part, held, values)
    return {key: value for key, value in values.items() if value is not None}


def _model_type(held: Mapping[str, tuple[_Part, TensorInfo]], values: Mapping[str, Any]) -> str:
    """Hugging Face's name for a LLaMA with a sliding window, or with biases of q, k and v alone."""
    if "blk.0.attn_q.bias" in held and "blk.0.attn_output.bias" not in held:
        return "qwen2"
    return "mistral" if values["sliding_window"] else "llama"


def _shortest(part: _Part, key: str) -> float | None:
    """A float32 of the metadata as the shortest number that rounds to it: 1e-05."""
    value = _field(part, f"llama.{key}", (int, float))
    return None if value is None else float(str(np.float32(value)))


def _head_dim(part: _Part, values: Mapping[str, Any]) -> int | None:
    """Width of a head, all of which must rotate; None where it is hidden_size / heads."""
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    stated = {
        f"llama.{key}": width
        for key in keys
        if (width := _field(part, f"llama.{key}", (int,))) is not None
    }
    if len(set(stated.values())) > 1:
        part.fail(f"{', '.join(stated)}: got {[*stated.values()]}, must be equal")
    return next(iter(stated.values()), None)


def _rope_scaling(
    part: _Part, held: Mapping[str, tuple[_Part, TensorInfo]], values: Mapping[str, Any]
) -> dict[str, Any] | None:
    """rope_scaling of config.json: Llama 3's from its table, others from the metadata."""
    prefix = "llama.rope.scaling."
    kind = _field(part, f"{prefix}type", (str,), "none")
    if _ROPE_FACTORS in held:
        return _llama3_scaling(part, *held[_ROPE_FACTORS], values)
    # Files of 2023 state a linear scale without a type.
    linear = _field(part, "llama.rope.scale_linear", (int, float), 1.0)
    factor = _field(part, f"{prefix}factor", (int, float), linear)
    if kind == "none":
        return {"rope_type": "linear", "factor": float(linear)} if linear != 1 else None
    scaling = {"rope_type": kind, "factor": float(factor)}
    if original := _field(part, f"{prefix}original_context_length", (int,)):
        scaling["original_max_position_embeddings"] = original
    return scaling


# (low_freq_factor, high_freq_factor, original context) of the models of Llama 3.1 to 3.3, whose
# files do not state them.
_LLAMA3 = (1.0, 4.0, 8192)


def _llama3_scaling(
    part: _Part, owner: _Part, info: TensorInfo, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters whose table of divisors is the one in the file."""
    if info.kind != "F32" or len(info.shape) != 1 or info.shape[0] > MAX_ENTRIES:
        owner.fail(f"{_ROPE_FACTORS}: got {info.kind} of shape {info.shape}, must be F32 (n,)")
    table = np.frombuffer(owner.map, "<f4", info.shape[0], info.offset)
    prefix = "rope.scaling."
    low = _shortest(part, f"{prefix}low_freq_factor") or _LLAMA3[0]
    high = _shortest(part, f"{prefix}high_freq_factor") or _LLAMA3[1]
    original = _field(part, f"llama.{prefix}original_context_length", (int,), _LLAMA3[2])
    factor = float(table.max(initial=0))
    with np.errstate(all="ignore"):  # whatever a damaged file holds
        theta = values["rope_theta"] or 10000.0
        expected = _llama3_table(len(table), theta, factor, low, high, float(original))
        known = factor >= 1 and np.allclose(table, expected, rtol=1e-5, atol=0)
    if not known:
        part.fail(
            f"{_ROPE_FACTORS}: holds factors that are not those of Llama 3 (low_freq_factor {low}, "
            f"high_freq_factor {high}, original context {original}): others can be computed only if"
            " llama.rope.scaling states these three numbers"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _llama3_table(
    count: int, theta: float, factor: float, low: float, high: float, original: float
) -> npt.NDArray[np.float64]:
    """What each of `count` frequencies is divided by: 1 for fast ones, `factor` for slow ones."""
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / max(count, 1))
    share = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 1: kept
    return 1 / ((1 - share) / max(factor, 1) + share)


def _special_ids(part: _Part) -> tuple[int | None, tuple[int, ...]]:
    """(BOS id, stop ids): the end of a text, of a turn and of a message."""
    keys = ("eos", "eot", "eom")
    ids = [_field(part, f"tokenizer.ggml.{key}_token_id", (int,)) for key in keys]
    stops = dict.fromkeys(stop for stop in ids if stop is not None)
    return _field(part, "tokenizer.ggml.bos_token_id", (int,)), tuple(stops)
