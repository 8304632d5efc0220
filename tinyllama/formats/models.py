"""Opening a model, in whatever form it lies: one function, and what every form offers.

a folder with config.json      Hugging Face's (huggingface.py)
a folder with params.json      Meta's (meta.py)
a file NAME.gguf               llama.cpp's (gguf.py)
OWNER/NAME                     any of these, by its name on the hub (hub.py)
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.formats import hub
from tinyllama.formats.dtypes import NumpyArray, RawArray
from tinyllama.formats.gguf import SUFFIX, GgufFile
from tinyllama.formats.huggingface import HfFolder
from tinyllama.formats.meta import MetaFolder, is_meta
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.formats.safetensors import LazyArray


class ModelSource(Protocol):
    """A model that is read tensor by tensor, under Hugging Face's names and in its layout.

    Opening reads headers only. `entries` is the parsed config.json, empty where there is none.
    """

    path: Path
    config: LlamaConfig
    bos_id: int | None
    eos_ids: tuple[int, ...]
    entries: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """Names of the tensors in each safetensors file that a copy of the model is to have."""

    def dtype(self, name: str) -> str:
        """The type a tensor is stored as, such as "BF16"."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def array(self, name: str) -> NumpyArray:
        """A read-only view of a tensor as it is stored; bfloat16 comes as uint16."""

    def raw(self, name: str) -> NumpyArray:
        """What is stored of a tensor, flat: its elements, or the bytes of its blocks."""

    def rows(self, name: str, rows: slice) -> RawArray:
        """Some rows of a tensor as it is stored, or in F32 where that is quantised."""

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of integers with scales."""

    def packed_form(self, name: str) -> PackedForm | None:
        """The form of those blocks, if layers multiply by it as it is."""

    def packed(self, name: str, rows: slice) -> PackedRows:
        """Some rows of a tensor that has a `packed_form`."""

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, exactly."""

    def source(self, name: str) -> LazyArray:
        """A tensor as `save_folder` takes it, still unread."""

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages from this process."""

    def check(self) -> None:
        """Compare names, shapes and types with those of the configuration. Raises WeightsError."""


def local_path(model: str | os.PathLike[str]) -> Path:
    """The folder or file of a model: `model` itself where that exists, else what its name on the
    hub stands for. Raises WeightsError if that cannot be fetched."""
    text = os.fspath(model)
    # Below a folder that is here, a name is a path, if a mistaken one.
    if os.path.lexists(text) or os.path.isdir(os.path.dirname(text)) or hub.parse(text) is None:
        return Path(text)
    return hub.fetch(text)


def names_a_model(text: str) -> bool:
    """Whether text names a folder, a GGUF file or a model on the hub, and no other file."""
    path = Path(text)
    if path.exists() or path.suffix == SUFFIX:
        return path.is_dir() or path.suffix == SUFFIX
    return hub.parse(text) is not None and not path.parent.is_dir() and path.suffix != ".toml"


def open_model(model: str | os.PathLike[str]) -> ModelSource:
    """A model whose tensors are exactly those that its configuration implies.

    Only headers are read. Raises ConfigError and WeightsError.
    """
    path = local_path(model)
    opened: ModelSource
    if path.suffix == SUFFIX and not path.is_dir():
        opened = GgufFile(path)
    else:
        opened = MetaFolder(path) if is_meta(path) else HfFolder(path)
    opened.check()
    return opened
