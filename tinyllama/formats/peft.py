"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

    base_model.model.PATH.lora_A.weight [r, in],  base_model.model.PATH.lora_B.weight [out, r]
    W + scale B A,  scale = alpha / r, or alpha / sqrt(r) with use_rslora
    base_model.model.PATH.lora_embedding_A [r, V], .lora_embedding_B [h, r] of the embedding: the
    transpose of B A is added
    base_model.model.NAME: a tensor of the base that was trained as a whole (modules_to_save)

A folder written here also carries, in the metadata of the second file: a fingerprint of its base,
which distinguishes bases of equal sizes; a digest of the vocabulary it was trained with; and the
block size of a base that was packed in 4 bits (QLoRA), since its adapters belong to that form.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats import hub
from tinyllama.formats.dtypes import FLOATS, NumpyArray
from tinyllama.formats.expressions import expression
from tinyllama.formats.huggingface import (
    EMBEDDING,
    HEAD,
    Shape,
    linear_shapes_by_path,
    llama_shapes,
)
from tinyllama.formats.int4 import Packing
from tinyllama.formats.models import ModelSource, local_path, open_model
from tinyllama.formats.safetensors import (
    FileDigest,
    SafetensorsFile,
    Source,
    write_safetensors,
)
from tinyllama.system import checked
from tinyllama.system.threads import together
from tinyllama.system.untrusted import printable, read_json, shown_shape, some_of, typed

ADAPTER_CONFIG = "adapter_config.json"

# Keys that are read here, or do not change what the adapter computes.
_KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern"}
_KNOWN |= {"alpha_pattern", "layers_to_transform", "layers_pattern", "base_model_name_or_path"}
_KNOWN |= {"modules_to_save"}
_KNOWN |= {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}
_KNOWN |= {"megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"}
# The values of a key that are supported; of all other keys, only empty values are.
_ONLY: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
# Initializations that leave the base as it is; pissa, olora, corda and loftq change it.
_ONLY["init_lora_weights"] = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Placement:
    """The adapter of one layer: the rank of A and B, and the numerator of their scale."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a model: `placed` by the layer's path.

    base is the base's folder, base_fingerprint what `fingerprint` gives for it, if known;
    block_size and requantize those of a base which was packed when the adapters were trained on it,
    tokenizer_digest that of the vocabulary (`Tokenizer.vocabulary_digest`) they were trained with.
    saved are the tensors of the base that the adapter's folder holds instead, as a whole.
    """

    placed: Mapping[str, Placement]
    use_rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    base_fingerprint: str | None = None
    block_size: int | None = None
    requantize: bool = False
    tokenizer_digest: str | None = None
    saved: frozenset[str] = frozenset()

    def scale(self, path: str) -> float:
        """The factor of B A in a layer."""
        place = self.placed[path]
        return place.alpha / (math.sqrt(place.rank) if self.use_rslora else place.rank)

    def summary(self) -> str:
        """Ranks, numerators and layers, for messages."""
        kinds = {f"rank {place.rank}, alpha {place.alpha:g}" for place in self.placed.values()}
        names = {path.rpartition(".")[2] for path in self.placed}
        rslora = ", use_rslora" if self.use_rslora else ""
        return f"{'; '.join(sorted(kinds))}{rslora} on {', '.join(sorted(names))}"


class _Entries(msgspec.Struct):
    """The types of what is read of adapter_config.json; `unsupported` checks the values."""

    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


# A pattern for each of 200 layers is usual; all of them are compared with every layer's path.
_MAX_PATTERNS = 2000
# Such patterns need no care: without repeats, Python's own engine takes linear time.
_PLAIN = re.compile(r"(?:\w|\.|\\\.)+")


class _Patterns:
    """rank_pattern or alpha_pattern: the value of the first key that matches the end of a path."""

    def __init__(self, values: Mapping[str, Any] | None, default: Any) -> None:
        self._default = default
        self._tests = [(_end_test(key), value) for key, value in (values or {}).items()]

    def __getitem__(self, path: str) -> Any:
        return next((value for test, value in self._tests if test(path)), self._default)


def _end_test(key: str) -> Callable[[str], object]:
    """Whether a path, or what follows one of its points, matches a key, as PEFT matches it."""
    if _PLAIN.fullmatch(key):
        return re.compile(rf"(?:.*\.)?(?:{key})").fullmatch
    return expression(rf"(?:.*\.)?(?:{key})").matches


def targets(entries: Mapping[str, Any], path: str) -> bool:
    """Whether target_modules and layers_to_transform choose a layer, as PEFT decides it."""
    names = entries.get("target_modules") or ()
    if isinstance(names, str):
        if names.lower() == "all-linear":
            return path not in (_HEAD_PATH, _EMBEDDING_PATH)
        return expression(names).matches(path)
    layers = entries.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or ()
    if numbers:
        parts = path.split(".")
        if parts[1:2] != ["layers"] or int(parts[2]) not in numbers:
            return False
    return any(path == name or path.endswith(f".{name}") for name in names)


def saves(entries: Mapping[str, Any], name: str) -> bool:
    """Whether modules_to_save chooses a tensor's module, or one that holds it."""
    module = f".{name.rpartition('.')[0]}."
    return any(f".{saved}." in module for saved in entries.get("modules_to_save") or ())


def to_peft(config: AdapterConfig, layers: Collection[str]) -> dict[str, Any]:
    """adapter_config.json: the most common rank and alpha, and patterns for other layers."""
    rank = Counter(place.rank for place in config.placed.values()).most_common(1)[0][0]
    alpha = Counter(place.alpha for place in config.placed.values()).most_common(1)[0][0]
    names = {path.rpartition(".")[2] for path in config.placed}
    everywhere = {path for path in layers if path.rpartition(".")[2] in names}
    base, revision = config.base, None
    if base is not None and not os.path.isabs(base) and (name := hub.parse(base)):
        file = f":{name.file}" if name.file else ""
        base, revision = f"{name.repository}{file}", name.revision
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(names if everywhere == set(config.placed) else config.placed),
        "rank_pattern": {p: x.rank for p, x in config.placed.items() if x.rank != rank},
        "alpha_pattern": {p: x.alpha for p, x in config.placed.items() if x.alpha != alpha},
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def unsupported(entries: Mapping[str, Any]) -> Iterator[str]:
    """One problem for each thing in the parsed file that is not supported here."""
    for key, value in entries.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                got = printable(repr(value))
                yield f"{key}: got {got}, must be {_ONLY[key][0]!r}: nothing else is supported"
        elif key not in _KNOWN and value not in (None, False, [], {}, ""):
            got = printable(f"{key}: got {value!r}")
            yield f"{got}, must be absent or empty: it is not supported"
    pattern = entries.get("layers_pattern")
    if pattern not in (None, [], "", "layers", ["layers"]):
        yield f"layers_pattern: got {printable(repr(pattern))}, must be 'layers'"
    if entries.get("layers_to_transform") is not None and isinstance(
        entries.get("target_modules"), str
    ):
        yield "layers_to_transform: must be absent where target_modules is one expression"
    yield from _wrong_numbers(entries)
    if isinstance(names := entries.get("target_modules"), str):
        yield from _wrong_expression("target_modules", names)


def _wrong_numbers(entries: Mapping[str, Any]) -> Iterator[str]:
    """Problems with ranks and alphas, and with the patterns of layers that have others."""
    for key, pattern, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", (int, float)),
    ):
        word = "an integer" if kind is int else "a finite number"
        values = {key: entries.get(key, 8)}
        patterns = entries.get(pattern) or {}
        if len(patterns) > _MAX_PATTERNS:
            yield f"{pattern}: {len(patterns)} patterns, at most {_MAX_PATTERNS} are allowed"
            continue
        for layers, value in patterns.items():
            values[f"{pattern}.{layers}"] = value
            if not _PLAIN.fullmatch(layers):
                yield from _wrong_expression(pattern, layers)
        for place, value in values.items():
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not (good and 0 < value < _MOST[key]):
                got = printable(f"{place}: got {value!r}")
                yield f"{got}, must be {word} above 0"


_MOST = {"r": 1 << 31, "lora_alpha": 1e30}


def _wrong_expression(key: str, text: str) -> Iterator[str]:
    try:
        expression(text)
    except ValueError as error:
        got, why = printable(repr(text)), printable(error)
        yield f"{key}: got {got}, must be a regular expression or a list of names: {why}"


__all__ = [
    "PARTS",
    "AdapterConfig",
    "AdapterFolder",
    "Placement",
    "fingerprint",
    "is_adapter",
    "open_adapter",
    "save_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B")
_HEAD_PATH, _EMBEDDING_PATH = HEAD.removesuffix(".weight"), EMBEDDING.removesuffix(".weight")

_PREFIX = "base_model.model."
_FINGERPRINT = "base_fingerprint"
_BLOCK_SIZE = "base_int4_block_size"
_REQUANTIZE = "base_int4_requantized"  # present or not
_TOKENIZER = "tokenizer_vocabulary_sha256"
_SAMPLE_ELEMENTS = 1024
_WHOLE = "blake2b-256:"  # begins a fingerprint of all bytes
_PART_ELEMENTS = 1 << 20


class AdapterFolder:
    """An adapter's folder: its configuration is checked at once, its matrices are read later."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ConfigError (adapter_config.json) and WeightsError (no safetensors file)."""
        self.path = Path(folder)
        source = self.path / ADAPTER_CONFIG
        self._entries = read_json(source)
        typed(self._entries, _Entries, source)
        if problems := list(unsupported(self._entries)):
            raise ConfigError(some_of(problems, source))
        if not os.path.lexists(self.path / ADAPTER_WEIGHTS):
            raise WeightsError(f"{self.path}: holds no {ADAPTER_WEIGHTS}")
        self._file = SafetensorsFile(self.path / ADAPTER_WEIGHTS)

    def base_folder(self) -> Path:
        """The base that base_model_name_or_path names: where that is relative, from the adapter's
        folder, or else from the current one. Raises WeightsError if it is no folder."""
        if path := self._named_folder():
            return path
        named = self._entries.get("base_model_name_or_path")
        revision = self._entries.get("revision")
        repository, colon, file = str(named).partition(":")
        text = f"{repository}@{revision}{colon}{file}" if revision else str(named)
        if named and hub.parse(text):
            return local_path(text)
        there = os.path.normpath(os.path.abspath(self.path / str(named)))
        place = f" ({printable(there, 400)})" if named else ""
        raise WeightsError(
            f"{self.path / ADAPTER_CONFIG}: base_model_name_or_path: got "
            f"{printable(repr(named), 400)}{place}, must be the folder of the base model; if that "
            "has moved, type --base FOLDER"
        )

    def _named_folder(self) -> Path | None:
        named = str(self._entries.get("base_model_name_or_path") or "")
        if not named or "\0" in named or len(named) > 4096:
            return None
        if os.path.isabs(named):
            return Path(named) if os.path.exists(named) else None
        paths = ((self.path / named).resolve(), Path(named))
        return next((path for path in paths if os.path.exists(path)), None)

    def config(self, model: LlamaConfig) -> AdapterConfig:
        """The adapters on a model of these sizes.

        Raises WeightsError that names every tensor that is missing, extra, misshapen (a rank that
        is not the configuration's) or not floating, and ConfigError.
        """
        shapes = linear_shapes_by_path(model) | {
            _HEAD_PATH: (model.vocab_size, model.hidden_size),
            _EMBEDDING_PATH: (model.vocab_size, model.hidden_size),
        }
        ranks = _Patterns(self._entries.get("rank_pattern"), self._entries.get("r", 8))
        alphas = _Patterns(self._entries.get("alpha_pattern"), self._entries.get("lora_alpha", 8))
        placed = {
            path: Placement(ranks[path], float(alphas[path]))
            for path in shapes
            if targets(self._entries, path) and not saves(self._entries, f"{path}.weight")
        }
        whole = {n: s for n, s in _with_head(model).items() if saves(self._entries, n)}
        if not placed and not whole:
            raise ConfigError(
                f"{self.path / ADAPTER_CONFIG}: target_modules: got "
                f"{printable(repr(self._entries.get('target_modules')))}, must name linear layers "
                "of the model"
            )
        saved = self._check_tensors(placed, shapes, whole)
        rslora, made_for = bool(self._entries.get("use_rslora")), self._file.metadata
        return AdapterConfig(
            placed,
            rslora,
            float(self._entries.get("lora_dropout") or 0.0),
            self._entries.get("base_model_name_or_path"),
            made_for.get(_FINGERPRINT),
            self.block_size(),
            _REQUANTIZE in made_for,
            self.tokenizer_digest,
            frozenset(saved),
        )

    @property
    def tokenizer_digest(self) -> str | None:
        """Of the vocabulary that the adapters were trained with; None if the folder has none."""
        return self._file.metadata.get(_TOKENIZER)

    def block_size(self) -> int | None:
        """Of the base in 4 bits that the adapters were trained on; None if it was not packed."""
        text = self._file.metadata.get(_BLOCK_SIZE)
        if text is not None and not (text.isdecimal() and int(text) > 0):
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: {_BLOCK_SIZE}: got {text!r}, must be 1 or more"
            )
        return None if text is None else int(text)

    def packing(self) -> Packing | None:
        """How the base was packed that the adapters were trained on; None if it was not."""
        block_size = self.block_size()
        if block_size is None:
            return None
        return Packing(block_size, _REQUANTIZE in self._file.metadata)

    def check_base(self, base: ModelSource) -> None:
        """Raise WeightsError if the adapter was not made for this base.

        Folders written here carry their base's fingerprint. For others it is computed from the base
        that they name, if that is a folder; if not, only shapes can be compared.
        """
        made_for = self._file.metadata.get(_FINGERPRINT)
        named = self._named_folder()
        if made_for is None and named and (named.is_file() or (named / "config.json").is_file()):
            made_for = fingerprint(open_model(named))  # without a tied head, as `base` is
        if made_for is not None and made_for != (digest := _as(made_for, base)):
            there = named or self._entries.get("base_model_name_or_path")
            raise WeightsError(
                f"{self.path}: was made for another base ({there}, fingerprint {_begin(made_for)}) "
                f"than {base.path} (fingerprint {_begin(digest)})"
            )

    def matrix(self, path: str, part: str) -> npt.NDArray[np.float32]:
        """lora_A (rank, in) or lora_B (out, rank) of a layer. Raises WeightsError where it holds a
        value that is not finite."""
        return self._finite(_name_of(path, part))

    def delta(self, path: str, scale: float) -> npt.NDArray[np.float32]:
        """scale B A of a layer, (out, in); of the embedding its transpose, (V, h)."""
        a, b = (self.matrix(path, part) for part in PARTS)
        factor = np.float32(scale)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are the caller's to refuse
            product = (a.T * factor) @ b.T if path == _EMBEDDING_PATH else (b * factor) @ a
        return product.astype(np.float32, copy=False)

    def whole(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor that stands in place of the base's."""
        stored = self._saved_as(name)
        assert stored is not None
        return self._finite(stored)

    def _saved_as(self, name: str) -> str | None:
        """The name of a tensor in place of one of the base's: of modules_to_save, or of the layer
        below an adapter, which PEFT keeps where a vocabulary was resized."""
        path, _, part = name.rpartition(".")
        for stored in (f"{_PREFIX}{name}", f"{_PREFIX}{path}.base_layer.{part}"):
            if stored in self._file.tensors:
                return stored
        return None

    def _finite(self, name: str) -> npt.NDArray[np.float32]:
        values = self._file.float32(name)
        if not np.isfinite(values).all():
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS}: {name}: holds a value that is not finite"
            )
        return values

    def forget(self, path: str) -> None:
        """Release the memory of a layer's matrices."""
        for part in PARTS:
            self._file.forget(_name_of(path, part))

    def _check_tensors(
        self,
        placed: Mapping[str, Placement],
        shapes: Mapping[str, Shape],
        whole: Mapping[str, Shape],
    ) -> list[str]:
        """Names of the base's tensors in whose place others stand. Raises WeightsError."""
        expected: dict[str, Shape] = {}
        saved = [name for name in whole if self._saved_as(name) is not None]
        problems = [f"{_PREFIX}{name}: missing" for name in whole if name not in saved]
        for path, place in placed.items():
            out, into = shapes[path] if path != _EMBEDDING_PATH else shapes[path][::-1]
            expected[_name_of(path, "lora_A")] = (place.rank, into)
            expected[_name_of(path, "lora_B")] = (out, place.rank)
            if f"{_PREFIX}{path}.base_layer.weight" in self._file.tensors:
                saved.append(f"{path}.weight")
                whole = {**whole, f"{path}.weight": shapes[path]}
        expected |= {str(self._saved_as(name)): whole[name] for name in saved}
        stored = self._file.tensors
        problems += [f"{name}: missing" for name in expected if name not in stored]
        extra = stored.keys() - expected.keys()
        problems += [f"{printable(name)}: extra, no adapter goes there" for name in extra]
        for name in expected.keys() & stored.keys():
            if (shape := stored[name].shape) != expected[name]:
                layer = placed.get(name.removeprefix(_PREFIX).rpartition(".lora_")[0])
                has = f" and rank {layer.rank} have" if layer else " has"
                wanted = f"{expected[name]}, as the base{has} it"
                problems.append(f"{name}: shape {shown_shape(shape)}, must be {wanted}")
            if stored[name].dtype not in FLOATS:
                problems.append(f"{name}: type {stored[name].dtype}, must be one of {FLOATS}")
        if problems:
            raise WeightsError(some_of(problems, self.path / ADAPTER_WEIGHTS))
        return saved


def _name_of(path: str, part: str) -> str:
    """The name of A or B of a layer in the adapter's file."""
    if path == _EMBEDDING_PATH:
        return f"{_PREFIX}{path}.{part.replace('lora_', 'lora_embedding_')}"
    return f"{_PREFIX}{path}.{part}.weight"


def _with_head(model: LlamaConfig) -> dict[str, Shape]:
    """Shapes of every parameter, the head's too where it is the embedding."""
    return llama_shapes(model) | {HEAD: (model.vocab_size, model.hidden_size)}


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def open_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[AdapterFolder, ModelSource]:
    """An adapter's folder, and its base: the folder `base`, or else the one that it names.

    Raises WeightsError where that is not the base that the adapter was made for.
    """
    adapter = AdapterFolder(folder)
    opened = open_model(adapter.base_folder() if base is None else base)
    adapter.check_base(opened)
    return adapter, opened


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Source],
    *,
    layers: Collection[str],
) -> dict[str, FileDigest]:
    """Fill a folder that PEFT loads; returns the digests of the two files.

    `tensors` are A and B by PATH.lora_A.weight; `layers` the paths of all linear layers of the
    model, which decide whether target_modules can be short. The base's path is written relative to
    the folder where both have a common parent, so that they can be moved together. Not atomic by
    itself; a folder of another name beside this one may become the adapter's.
    """
    config = replace(config, base=_path_from(folder, config.base))
    text = json.dumps(to_peft(config, layers), indent=2, sort_keys=True, ensure_ascii=False)
    data = f"{text}\n".encode()
    (folder / ADAPTER_CONFIG).write_bytes(data)
    metadata = {"format": "pt"}
    if config.base_fingerprint is not None:
        metadata[_FINGERPRINT] = config.base_fingerprint
    if config.block_size is not None:
        metadata[_BLOCK_SIZE] = str(config.block_size)
        if config.requantize:
            metadata[_REQUANTIZE] = "true"
    if config.tokenizer_digest is not None:
        metadata[_TOKENIZER] = config.tokenizer_digest
    named = {f"{_PREFIX}{name}": source for name, source in tensors.items()}
    return {
        ADAPTER_CONFIG: FileDigest(hashlib.sha256(data).hexdigest(), len(data)),
        ADAPTER_WEIGHTS: write_safetensors(folder / ADAPTER_WEIGHTS, named, metadata),
    }


def _path_from(folder: Path, base: str | None) -> str | None:
    """A base's path from an adapter's folder; absolute where only the root is common to both."""
    if base is None or not Path(base).is_absolute():
        return base
    here, there = folder.resolve(), Path(base).resolve()
    if os.path.commonpath((here, there)) == here.anchor:
        return base
    return Path(os.path.relpath(there, here)).as_posix()


def fingerprint(folder: ModelSource) -> str:
    """BLAKE2b-256 over the name, type, shape and all bytes of every tensor of a model.

    It does not depend on their shards. Several threads take it; of large files it is remembered
    for a day (system/checked.py).
    """
    path = folder.path
    files = [path] if path.is_file() else [path / name for name in sorted(set(folder.files))]
    if not all(file.exists() for file in files):  # Meta's, whose files are those of a copy
        files = sorted(path.glob("*.safetensors"))
    return checked.digest("fingerprint", files, lambda: f"{_WHOLE}{_whole_fingerprint(folder)}")


def _whole_fingerprint(folder: ModelSource) -> str:
    names = sorted(folder.names)
    arrays = [folder.array(name).reshape(-1) for name in names]  # maps of files: nothing is read

    def summed(name: str, values: NumpyArray) -> bytes:
        digest = hashlib.blake2b(digest_size=32)
        digest.update(f"{name} {folder.dtype(name)} {folder.shape(name)}\n".encode())
        for start in range(0, values.size, _PART_ELEMENTS):
            digest.update(values[start : start + _PART_ELEMENTS].view(np.uint8).data)
            folder.forget(name)  # of a large tensor no more than a part is resident
        return digest.digest()

    sums = together(summed, names, arrays, work=sum(array.nbytes for array in arrays))
    return hashlib.blake2b(b"".join(sums), digest_size=32).hexdigest()


def _begin(digest: str) -> str:
    return printable(digest.removeprefix(_WHOLE), 12)


def _as(made_for: str, base: ModelSource) -> str:
    """A base's fingerprint, taken like the one that an adapter carries."""
    return fingerprint(base) if made_for.startswith(_WHOLE) else _sampled_fingerprint(base)


def _sampled_fingerprint(folder: ModelSource) -> str:
    """SHA-256 over the name, type, shape and three samples of every tensor, as adapters of earlier
    versions carry it."""
    digest = hashlib.sha256()
    for name in sorted(folder.names):
        digest.update(f"{name} {folder.dtype(name)} {folder.shape(name)}\n".encode())
        values = folder.raw(name)
        for start in (0, values.size // 2, max(0, values.size - _SAMPLE_ELEMENTS)):
            digest.update(values[start : start + _SAMPLE_ELEMENTS].tobytes())
        folder.forget(name)
    return digest.hexdigest()
