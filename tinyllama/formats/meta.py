"""A folder in Meta's own layout: params.json and consolidated*.safetensors.

    tok_embeddings, layers.N.attention.{wq,wk,wv,wo}, layers.N.feed_forward.{w1,w3,w2},
    layers.N.{attention,ffn}_norm, norm, output

Queries and keys rotate the pairs (2i, 2i+1) of a head; their rows are put into Hugging Face's
order, (i, i + D/2). Several files are the parts of a model for several devices: each holds a part
of every matrix, cut along the axis that its use needs, and all of every norm.

params.json names no longest row and, in Llama 3.2, not how far frequencies are scaled; what the
released models have is used. Files .pth are pickles and never read.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig, RopeScaling
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import NumpyArray, RawArray, to_float32
from tinyllama.formats.huggingface import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    Shape,
    check_names,
    llama_shapes,
)
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.formats.safetensors import LazyArray, SafetensorsFile
from tinyllama.system.untrusted import read_json, some_of, typed

PARAMS = "params.json"
_FILES = "consolidated*.safetensors"
_TOPS = {
    EMBEDDING: "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    HEAD: "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
# Matrices that several files cut along their inputs; the others are cut along their outputs, and
# the embedding along either, by the version of the model.
_CUT_INPUTS = ("attention.wo", "feed_forward.w2")
_COMPUTED = "rope.freqs"


class _Params(msgspec.Struct):
    """params.json, of LLaMA 1 to 3 and of Mistral."""

    dim: int
    n_layers: int
    n_heads: int
    norm_eps: float
    n_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    vocab_size: int = -1
    rope_theta: float | None = None
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    high_freq_factor: float | None = None
    sliding_window: int | None = None
    max_seq_len: int | None = None
    moe: Any = None


class MetaFolder:
    """A folder's model under Hugging Face's names and in its layout, read when used."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.entries: Mapping[str, Any] = {}
        self.bos_id: int | None = None  # they are the tokenizer's
        self.eos_ids: tuple[int, ...] = ()
        names = sorted(path.name for path in self.path.glob(_FILES))
        if not names:
            raise WeightsError(f"{self.path}: {_what_is_there(self.path)}")
        self._files = [SafetensorsFile(self.path / name) for name in names]
        self._stored = {n for n in self._files[0].names if not n.startswith(_COMPUTED)}
        self._held: dict[str, NumpyArray] = {}  # in our order, while rows of it are read
        self._check_alike()
        self.config = self._read_config()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(llama_shapes(self.config))

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors in each safetensors file that a copy is to have: all in one."""
        return {WEIGHTS: list(self.names)}

    def dtype(self, name: str) -> str:
        """The type a tensor is stored as, such as "BF16"."""
        return self._files[0].dtype(self._theirs(name))

    def shape(self, name: str) -> Shape:
        """A tensor's shape, whole."""
        theirs = self._theirs(name)
        shape = list(self._files[0].shape(theirs))
        axis = self._axis(name, theirs)
        if axis is not None:
            shape[axis] = sum(file.shape(theirs)[axis] for file in self._files)
        return tuple(shape)

    def array(self, name: str) -> NumpyArray:
        """A tensor in its stored type; bfloat16 comes as uint16."""
        theirs = self._theirs(name)
        axis = self._axis(name, theirs)
        parts = [file.array(theirs) for file in self._files]
        whole: NumpyArray = parts[0] if axis is None else np.concatenate(parts, axis)
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.kv_heads}
        count = heads.get(name.split(".")[-2])
        return whole if count is None else half_rotation(whole, count)

    def raw(self, name: str) -> NumpyArray:
        """The elements of a tensor, flat."""
        return self.array(name).reshape(-1)

    def rows(self, name: str, rows: slice) -> RawArray:
        """Some rows of a tensor in its stored type."""
        if name not in self._held:
            self._held[name] = self.array(name)
        values = self._held[name][rows]
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
        return to_float32(name, self.source(name).load())

    def source(self, name: str) -> LazyArray:
        """A tensor as `save_folder` takes it, still unread."""
        dtype, shape = self.dtype(name), self.shape(name)
        return LazyArray(dtype, shape, lambda: RawArray(dtype, shape, self.array(name)))

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages from this process."""
        self._held.pop(name, None)
        for file in self._files:
            file.forget(self._theirs(name))

    def check(self) -> None:
        """Compare names, shapes and types with those of the configuration. Raises WeightsError."""
        expected = llama_shapes(self.config)
        known = {self._theirs(name): name for name in expected}
        stored = {
            known.get(name, name): (
                self._files[0].dtype(name),
                self.shape(known[name]) if name in known else (),
            )
            for name in self._stored
        }
        check_names(expected, stored, str(self.path))

    def _check_alike(self) -> None:
        """Raise WeightsError if files hold other tensors, or another type, than the first one."""
        first, problems = self._files[0], []
        for file in self._files[1:]:
            for name in sorted(self._stored ^ {n for n in file.names if n[:10] != _COMPUTED}):
                problems.append(f"{file.path.name}: {name}: not in every {_FILES}")
            for name in self._stored & set(file.names):
                same = (file.dtype(name), len(file.shape(name)))
                if same != (first.dtype(name), len(first.shape(name))):
                    problems.append(f"{file.path.name}: {name}: not as in {first.path.name}")
        if problems:
            raise WeightsError(some_of(problems, self.path))

    def _read_config(self) -> LlamaConfig:
        path = self.path / PARAMS
        params = typed(read_json(path), _Params, path)
        if params.moe is not None:
            raise ConfigError(f"{path}: moe: a mixture of experts cannot be computed here")
        if not 0 < params.n_layers <= len(self._stored):
            raise ConfigError(
                f"{path}: n_layers: got {params.n_layers}, but the files hold "
                f"{len(self._stored)} tensors"
            )
        try:
            return LlamaConfig(
                vocab_size=self._rows("tok_embeddings.weight", "output.weight", params.dim),
                hidden_size=params.dim,
                num_layers=params.n_layers,
                num_heads=params.n_heads,
                num_kv_heads=params.n_kv_heads,
                head_size=_head_size(params),
                intermediate_size=self._rows("layers.0.feed_forward.w1.weight"),
                max_seq_len=_longest(params),
                rope_theta=params.rope_theta or 10000.0,
                rope_scaling=_scaling(params),
                sliding_window=params.sliding_window,
                rms_norm_eps=params.norm_eps,
                tie_word_embeddings="output.weight" not in self._stored,
            )
        except ConfigError as error:
            raise ConfigError(some_of(str(error).split("\n"), path)) from None

    def _rows(self, name: str, other: str | None = None, width: int | None = None) -> int:
        """Rows of a matrix in all files; of one that may be cut along its columns, where they are
        not all `width`, those of the `other` one."""
        for wanted in (name, other):
            if wanted in self._stored and wanted is not None:
                shapes = [file.shape(wanted) for file in self._files]
                if any(len(shape) != 2 for shape in shapes):
                    raise WeightsError(f"{self.path}: {wanted}: must be a matrix")
                if width is None or shapes[0][1] == width:
                    return sum(shape[0] for shape in shapes)
                if sum(shape[1] for shape in shapes) == width:
                    return shapes[0][0]
        raise WeightsError(f"{self.path}: {name}: missing")

    def _theirs(self, name: str) -> str:
        """Meta's name of a tensor."""
        if name in _TOPS:
            return _TOPS[name]
        _, _, number, path = name.split(".", 3)
        return f"layers.{number}.{_IN_LAYER[path.removesuffix('.weight')]}.weight"

    def _axis(self, name: str, theirs: str) -> int | None:
        """The axis along which the files cut a tensor; None where each holds all of it."""
        shape = self._files[0].shape(theirs)
        if len(self._files) == 1 or len(shape) != 2:
            return None
        if name == EMBEDDING:
            return int(shape[1] != self.config.hidden_size)
        return int(theirs.split(".", 2)[-1].removesuffix(".weight") in _CUT_INPUTS)


def half_rotation(weight: NumpyArray, heads: int) -> NumpyArray:
    """Rows (heads D, in) of pairs (2i, 2i+1) in the order of pairs (i, i + D/2)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _head_size(params: _Params) -> int | None:
    """head_dim, where it is not dim / n_heads."""
    if params.head_dim is None or params.head_dim * params.n_heads == params.dim:
        return None
    return params.head_dim


def _longest(params: _Params) -> int:
    """The longest row of the released models with such parameters."""
    if params.max_seq_len is not None:
        return params.max_seq_len
    if params.use_scaled_rope:
        return 131072  # Llama 3.1 to 3.3
    known = {500000.0: 8192, 1000000.0: 16384}  # Llama 3, CodeLlama
    if params.rope_theta in known:
        return known[params.rope_theta]
    return 2048 if params.norm_eps == 1e-6 else 4096  # LLaMA 1, Llama 2


def _scaling(params: _Params) -> RopeScaling | None:
    if not params.use_scaled_rope:
        return None
    small = params.dim <= 3072  # Llama 3.2 1B and 3B
    factor = params.rope_scaling_factor or (32.0 if small else 8.0)
    return RopeScaling("llama3", factor, 8192, 1.0, params.high_freq_factor or 4.0)


def _what_is_there(folder: Path) -> str:
    """Why a folder without such files is of no use."""
    if pickles := sorted(path.name for path in folder.glob("consolidated*.pth")):
        return f"holds {pickles[0]}, a pickle, which can run code and is never read: no {_FILES}"
    return f"no {_FILES}"


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout, and not in Hugging Face's as well."""
    return (folder / PARAMS).exists() and not (folder / "config.json").exists()
