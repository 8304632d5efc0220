"""GGUF files of LLaMA models and of LoRA adapters, written a tensor at a time.

    model      names of llama.cpp's `llama` architecture; the rows of q and k, and their biases, go
               from halves (i, i + head_dim / 2) to rotating pairs (2i, 2i + 1)
    adapter    TENSOR.lora_a [r, in], TENSOR.lora_b [out, r]; W + alpha / r B A

The `gguf` library lays the file out and quantises. Tensors of one dimension are F32, as llama.cpp
wants them, and rows that no block divides are F16. Formats of others that llama.cpp cannot compute
are refused by name. Source: docs/gguf.md of the ggml project.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import FLOATS, NUMPY, Array, NumpyArray, RawArray, convert, to_float32
from tinyllama.formats.gguf import LAYER_NAMES, TOP_NAMES
from tinyllama.formats.gguf_blocks import BLOCK_TYPES
from tinyllama.formats.huggingface import Shape
from tinyllama.formats.int4 import quantize_rows

Bytes = npt.NDArray[np.uint8]
# Metadata by key: text, truth, an unsigned number, a float, or a list of one of these.
Fields = Mapping[str, Any]

# general.file_type: what most tensors are.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32}
_QUANTIZATION_VERSION = 2
_GGUF_TOP = {theirs: ours for ours, theirs in TOP_NAMES.items()}
_GGUF_LAYER = {theirs: ours for ours, theirs in LAYER_NAMES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its type there ("F32", "Q4_0"), its shape, and what loads its bytes as
    they lie in the file: numpy's form of a float type, (rows, bytes per row) uint8 of blocks."""

    kind: str
    shape: Shape
    load: Callable[[], NumpyArray]

    @property
    def size_bytes(self) -> int:
        """What it takes in the file, without padding."""
        return math.prod(self.shape[:-1]) * _row_bytes(self.kind, self.shape[-1])


def write_gguf(path: Path, fields: Fields, tensors: Mapping[str, GgufTensor]) -> None:
    """Write one file; a tensor is loaded when its turn comes. Raises OSError, and WeightsError
    where a tensor is not what was announced."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    try:
        for key, value in fields.items():
            _add_field(writer, key, value)
        for name, tensor in tensors.items():
            kind = GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            data = tensor.load()
            if data.nbytes != tensor.size_bytes:
                raise WeightsError(f"{name}: {data.nbytes} bytes, must be {tensor.size_bytes}")
            writer.write_tensor_data(np.ascontiguousarray(data))
            del data  # one tensor at a time
    finally:
        writer.close()


def _add_field(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of Hugging Face's name."""
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.{kind}"
    _, _, number, layer = stem.split(".", 3)
    return f"blk.{number}.{_GGUF_LAYER[layer]}.{kind}"


def permuted(name: str, config: LlamaConfig, rows: NumpyArray) -> NumpyArray:
    """The rows of a tensor, or of its lora_B, in GGUF's order; only q's and k's have another."""
    heads = _heads(name, config)
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def kind_for(kind: str, shape: Shape) -> str:
    """The type that a tensor of this shape is stored as where a model is to be `kind`."""
    if len(shape) == 1:
        return "F32"
    if kind in BLOCK_TYPES and shape[-1] % BLOCK_TYPES[kind].values:
        return "F16"
    return kind


def encoded(label: str, array: Array, kind: str) -> NumpyArray:
    """An array in the form of GgufTensor.load, rounded to `kind`: F32, F16, BF16, Q8_0 or Q4_0.

    Raises WeightsError, beginning with `label`, for a value that the type cannot hold.
    """
    if kind in FLOATS:
        return convert(label, array, kind)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = to_float32(label, array)
    if not np.isfinite(values).all():
        raise WeightsError(f"{label}: holds a value that is not finite, which {kind} cannot hold")
    with np.errstate(over="ignore", divide="ignore"):  # a scale too large is found below
        blocks: Bytes = quantize(values, GGMLQuantizationType[kind])
    scales = blocks.reshape(-1).view(BLOCK_TYPES[kind].memory)["d"]
    if not np.isfinite(scales).all():
        raise WeightsError(f"{label}: {np.abs(values).max():g} is too large for {kind}")
    return blocks


def q4_0_as_trained(label: str, weight: npt.NDArray[np.float32], block_size: int) -> Bytes:
    """The blocks of Q4_0 whose values are exactly those of a QLoRA run's 4 bits.

    A group of `block_size` weights with q in -7 .. 7 and one float16 scale is block_size / 32
    blocks of the same scale. Raises WeightsError for a value that 4 bits cannot hold.
    """
    try:
        packed, scales = quantize_rows(weight, block_size)
    except ValueError as error:
        raise WeightsError(f"{label}: {error}") from error
    signed = np.stack([packed & 15, packed >> 4], axis=-1) ^ 8  # q + 8, in the order of the row
    halves = signed.reshape(len(weight), -1, 2, 16)  # of blocks of 32
    blocks = np.empty(halves.shape[:2], BLOCK_TYPES["Q4_0"].memory)
    blocks["d"] = np.repeat(scales, block_size // 32, axis=1)
    blocks["q"] = halves[:, :, 0] | halves[:, :, 1] << 4
    return blocks.view(np.uint8).reshape(len(weight), -1)


def as_trained_problem(block_size: int) -> str | None:
    """Why Q4_0 cannot hold a QLoRA base of this block size; None if it can."""
    if block_size % 32 == 0:
        return None
    return (
        f"its base was trained in 4 bits with block_size {block_size}, and Q4_0 has a scale per 32 "
        "weights: only multiples of 32 can be written exactly"
    )


# ---- metadata


def model_fields(config: LlamaConfig, kinds: Sequence[str], name: str) -> dict[str, Any]:
    """The metadata of a model without those of its tokenizer. `kinds` are the types of its
    matrices. Raises ConfigError for what llama.cpp's `llama` cannot compute."""
    most = max(kinds, key=lambda kind: (kinds.count(kind), kind), default="F32")
    # Its `llama` attends to all tokens: up to the window that is the same.
    length = min(config.max_seq_len, getattr(config, "sliding_window", None) or config.max_seq_len)
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES.get(most, 0),
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": length,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if any(kind in BLOCK_TYPES for kind in kinds):
        fields["general.quantization_version"] = _QUANTIZATION_VERSION
    return fields | _rope_fields(config)


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The metadata of a scaling of the rotary frequencies. Programs take Llama 3's from a tensor;
    the numbers behind it are for us, who read them back."""
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None:
        return {}
    prefix = "llama.rope.scaling."
    if scaling.rope_type == "llama3":
        return {
            f"{prefix}original_context_length": _original_context(config),
            f"{prefix}low_freq_factor": float(scaling.low_freq_factor),
            f"{prefix}high_freq_factor": float(scaling.high_freq_factor),
        }
    fields = {f"{prefix}type": scaling.rope_type, f"{prefix}factor": float(scaling.factor)}
    if scaling.rope_type == "linear":
        return fields
    if scaling.rope_type != "yarn":
        raise ConfigError(
            f"rope_scaling: got {scaling.rope_type!r}, which no GGUF file can hold: linear, yarn "
            "and llama3 can be exported"
        )
    for key in ("attention_factor", "mscale", "mscale_all_dim", "truncate"):
        if getattr(scaling, key) not in (None, True):
            raise ConfigError(
                f"rope_scaling.{key}: got {getattr(scaling, key)}, must not be set in a model that "
                "is exported to GGUF: llama.cpp computes its own"
            )
    fields[f"{prefix}original_context_length"] = _original_context(config)
    for key in ("beta_fast", "beta_slow"):
        if (value := getattr(scaling, key)) is not None:
            fields[f"{prefix}yarn_{key}"] = float(value)
    return fields


def _original_context(config: LlamaConfig) -> int:
    """Positions that a model with scaled frequencies had before."""
    scaling = config.rope_scaling
    assert scaling is not None
    return scaling.original_max_position_embeddings or config.max_seq_len


def rope_factors(config: LlamaConfig) -> dict[str, GgufTensor]:
    """rope_freqs.weight, what each frequency is divided by; of a model without Llama 3's scaling,
    nothing."""
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None or scaling.rope_type != "llama3":
        return {}
    original = _original_context(config)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    half = config.head_dim // 2
    wavelengths = 2 * math.pi * config.rope_theta ** (np.arange(half) / half)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 1: the frequency stays
    factors = (1 / ((1 - kept) / scaling.factor + kept)).astype(np.float32)
    return {"rope_freqs.weight": GgufTensor("F32", (half,), lambda: factors)}


def adapter_fields(name: str, alpha: float) -> dict[str, Any]:
    """The metadata of a LoRA adapter."""
    return {
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }


# A layer's weight by Hugging Face's path, with its A (r, in), B (out, r) and scale.
Low = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float]


def adapter_tensors(
    config: LlamaConfig,
    placed: Mapping[str, tuple[int, int, int]],
    alpha: float,
    load: Callable[[str], Low],
    kind: str,
) -> dict[str, GgufTensor]:
    """The tensors of an adapter, by GGUF's names.

    `placed` has (rank, in, out) of each path; llama.cpp multiplies B A by alpha / rank, so that B
    carries what is left of a layer's own scale.
    """
    tensors = {}
    for path, (rank, into, out) in placed.items():
        name = f"{path}.weight"

        def low_a(path: str = path) -> NumpyArray:
            return encoded(f"{path}.lora_A", load(path)[0], kind)

        def low_b(path: str = path, name: str = name, rank: int = rank) -> NumpyArray:
            _, b, scale = load(path)
            factor = scale * rank / alpha
            b = b if math.isclose(factor, 1, rel_tol=1e-7) else b * np.float32(factor)
            return encoded(f"{path}.lora_B", permuted(name, config, b), kind)

        tensors[f"{gguf_name(name)}.lora_a"] = GgufTensor(kind, (rank, into), low_a)
        tensors[f"{gguf_name(name)}.lora_b"] = GgufTensor(kind, (out, rank), low_b)
    return tensors


def read_adapter(path: Path, config: LlamaConfig) -> Callable[[str], Low]:
    """What reads the matrices of a path of an adapter's file, as llama.cpp computes with them."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())

    def matrix(name: str) -> npt.NDArray[np.float32]:
        tensor = tensors[name]
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in tensor.shape[::-1])
        data = np.ascontiguousarray(tensor.data).view(NUMPY[kind]).reshape(shape)
        return to_float32(name, RawArray(kind, shape, data))

    def load(path: str) -> Low:
        a, b = (matrix(f"{gguf_name(f'{path}.weight')}.lora_{part}") for part in "ab")
        return a, in_halves(f"{path}.weight", config, b), alpha / len(a)

    return load


def in_halves(name: str, config: LlamaConfig, rows: NumpyArray) -> NumpyArray:
    """The inverse of `permuted`."""
    heads = _heads(name, config)
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _heads(name: str, config: LlamaConfig) -> int | None:
    """Of a tensor whose rows have another order in GGUF."""
    return {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])


def _row_bytes(kind: str, width: int) -> int:
    if kind in BLOCK_TYPES:
        return width // BLOCK_TYPES[kind].values * BLOCK_TYPES[kind].memory.itemsize
    return width * np.dtype(NUMPY[kind]).itemsize


__all__ = [
    "GgufTensor",
    "adapter_fields",
    "adapter_tensors",
    "as_trained_problem",
    "encoded",
    "gguf_name",
    "kind_for",
    "model_fields",
    "permuted",
    "q4_0_as_trained",
    "read_adapter",
    "rope_factors",
    "write_gguf",
]
