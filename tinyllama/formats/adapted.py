"""A base as an adapter's folder changes it outside of the layers: trained as a whole, or its
embedding and head by low-rank matrices.

A tied head that an adapter changes, or whose embedding it changes, becomes a matrix of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tinyllama.formats.dtypes import NumpyArray, RawArray
from tinyllama.formats.huggingface import EMBEDDING, HEAD, Shape
from tinyllama.formats.models import ModelSource
from tinyllama.formats.packed import PackedForm, PackedRows
from tinyllama.formats.peft import AdapterConfig, AdapterFolder
from tinyllama.formats.safetensors import LazyArray

Float32 = npt.NDArray[np.float32]


def adapted(base: ModelSource, adapter: AdapterFolder, config: AdapterConfig) -> ModelSource:
    """`base` with all that an adapter changes outside of the layers; itself if that is nothing."""
    deltas = {name: adapter for name in (EMBEDDING, HEAD) if _path(name) in config.placed}
    if not deltas and not config.saved:
        return base
    return AdaptedBase(base, dict.fromkeys(config.saved, adapter), deltas, config)


def replaced(
    base: ModelSource, parts: Iterable[tuple[AdapterFolder, AdapterConfig]]
) -> ModelSource:
    """`base` with the tensors that adapters hold as a whole, its head untied if they do so."""
    whole: dict[str, AdapterFolder] = {}
    touched: set[str] = set()
    for adapter, config in parts:
        whole |= dict.fromkeys(config.saved, adapter)
        touched |= {name for name in (EMBEDDING, HEAD) if _path(name) in config.placed}
    unties = base.config.tie_word_embeddings and bool(touched)
    return AdaptedBase(base, whole, {}, None, unties=unties) if whole or unties else base


class AdaptedBase:
    """A base whose tensors `whole` come from adapters, to some of which `deltas` are added."""

    def __init__(
        self,
        base: ModelSource,
        whole: Mapping[str, AdapterFolder],
        deltas: Mapping[str, AdapterFolder],
        placed: AdapterConfig | None,
        *,
        unties: bool = False,
    ) -> None:
        self._base, self._whole, self._deltas, self._placed = base, whole, deltas, placed
        touched = {EMBEDDING, HEAD} & (whole.keys() | deltas.keys())
        self.unties = base.config.tie_word_embeddings and (unties or bool(touched))
        self.path, self.entries = base.path, base.entries
        self.bos_id, self.eos_ids = base.bos_id, base.eos_ids
        self.config = (
            replace(base.config, tie_word_embeddings=False) if self.unties else base.config
        )
        self._changed = whole.keys() | deltas.keys() | ({HEAD} if self.unties else set())
        self._held: dict[str, Float32] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return (*self._base.names, *[HEAD][: self.unties])

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """Names of the tensors in each file of a copy; an untied head is beside its embedding."""
        return {
            file: [*names, *[HEAD][: self.unties and EMBEDDING in names]]
            for file, names in self._base.files.items()
        }

    def dtype(self, name: str) -> str:
        """The type that a tensor has in the base."""
        return self._base.dtype(self._own(name))

    def shape(self, name: str) -> Shape:
        """A tensor's shape."""
        return self._base.shape(self._own(name))

    def array(self, name: str) -> NumpyArray:
        """A tensor as it is stored; a changed one in float32."""
        return self.float32(name) if name in self._changed else self._base.array(name)

    def raw(self, name: str) -> NumpyArray:
        """The same, flat."""
        return self.array(name).reshape(-1) if name in self._changed else self._base.raw(name)

    def rows(self, name: str, rows: slice) -> RawArray:
        """Some rows of a tensor as it is stored; of a changed one in float32."""
        if name not in self._changed:
            return self._base.rows(name, rows)
        if name not in self._held:
            self._held[name] = self.float32(name)
        values = self._held[name][rows]
        return RawArray("F32", values.shape, values)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of integers."""
        return name not in self._changed and self._base.is_quantized(name)

    def packed_form(self, name: str) -> PackedForm | None:
        """The form of those blocks, if layers multiply by it as it is."""
        return None if name in self._changed else self._base.packed_form(name)

    def packed(self, name: str, rows: slice) -> PackedRows:
        """Some rows of a tensor that has a `packed_form`."""
        return self._base.packed(name, rows)

    def float32(self, name: str) -> Float32:
        """A tensor as float32, changed."""
        if name not in self._changed:
            return self._base.float32(name)
        whole, delta = self._whole.get(name), self._deltas.get(name)
        values = self._base.float32(self._own(name)) if whole is None else whole.whole(name)
        if delta is None or self._placed is None:
            return values
        return values + delta.delta(_path(name), self._placed.scale(_path(name)))

    def source(self, name: str) -> LazyArray:
        """A tensor as `save_folder` takes it, still unread."""
        if name not in self._changed:
            return self._base.source(name)
        return LazyArray(self.dtype(name), self.shape(name), lambda: self.float32(name))

    def forget(self, name: str) -> None:
        """Let the system drop a tensor's pages from this process."""
        self._held.pop(name, None)
        self._base.forget(self._own(name))

    def check(self) -> None:
        """The base was checked when it was opened, what is in its place with the adapter."""

    def _own(self, name: str) -> str:
        """The tensor of the base that one of these begins as."""
        return EMBEDDING if name == HEAD and self.unties else name


def _path(name: str) -> str:
    return name.removesuffix(".weight")
