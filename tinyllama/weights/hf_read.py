"""A Hugging Face LLaMA folder, read: one safetensors file or shards with an index."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllama.errors import WeightsError
from tinyllama.weights.dtypes import NumpyArray
from tinyllama.weights.header import read_header
from tinyllama.weights.hf_config import config_from_hf, read_json, special_ids
from tinyllama.weights.hf_names import (
    EMBEDDING,
    HEAD,
    INDEX,
    WEIGHTS,
    Shape,
    check_names,
    llama_shapes,
)
from tinyllama.weights.safetensors import LazyArray, SafetensorsFile

_COMPUTED = ".rotary_emb.inv_freq"  # a table that old folders carry; it follows from rope_theta


class HfFolder:
    """A folder's model: its configuration and special tokens, and tensors read when asked for."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise WeightsError(f"{self.path}: not a folder")
        found = read_json(self.path / "config.json")
        self.config = config_from_hf(found, str(self.path / "config.json"))
        self.bos_id, self.eos_ids = special_ids(self.path, found)
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
        """Compare names, shapes and types with what the configuration asks for (WeightsError)."""
        # Some writers store the tied head a second time; it may go only if it is the same matrix.
        if self.config.tie_word_embeddings and {HEAD, EMBEDDING} <= self._file_of.keys():
            if np.array_equal(self.array(HEAD), self.array(EMBEDDING)):
                del self._file_of[HEAD]
        found = {name: (self.dtype(name), self.shape(name)) for name in self._file_of}
        check_names(llama_shapes(self.config), found, str(self.path))

    def _locate(self) -> dict[str, str]:
        """Name of the file that holds each tensor."""
        if (self.path / WEIGHTS).exists():
            file_of = dict.fromkeys(_names_in(self.path / WEIGHTS) or (), WEIGHTS)
        elif (self.path / INDEX).exists():
            file_of = self._read_index()
        else:
            raise WeightsError(f"{self.path}: {_what_is_there(self.path)}")
        return {name: file for name, file in file_of.items() if not name.endswith(_COMPUTED)}

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(_is_plain(file) for file in index.values()):
            raise WeightsError(f"{path}: weight_map: must map names to files of this folder")
        held = {file: _names_in(self.path / file) for file in sorted(set(index.values()))}
        problems = [f"{file}: missing" for file, names in held.items() if names is None]
        for name, file in index.items():
            names = held[file]
            if names is not None and name not in names:
                problems.append(f"{name}: not in {file}")
        if problems:
            raise WeightsError("\n".join(f"{path}: {problem}" for problem in problems))
        # A shard may hold what the index forgot: kept, so that `check` can say it is extra.
        return {name: file for file, names in held.items() for name in names or ()} | index

    def _open(self, name: str) -> SafetensorsFile:
        file = self._file_of.get(name)
        if file is None:
            raise WeightsError(f"{self.path}: {name}: no such tensor")
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.path / file)
        return self._files[file]


def open_folder(folder: str | os.PathLike[str]) -> HfFolder:
    """Open a folder whose tensors are exactly those that its config.json asks for.

    Only headers are read. Raises ConfigError (config.json) and WeightsError.
    """
    opened = HfFolder(folder)
    opened.check()
    return opened


def _names_in(file: Path) -> tuple[str, ...] | None:
    """Names of a file's tensors, or None where there is no such file."""
    return tuple(read_header(file).tensors) if file.is_file() else None


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
