"""adapter_config.json of PEFT: which layers have adapters, of which rank and scale.

rank_pattern, alpha_pattern and layers_to_transform are honoured; what cannot be computed here is
refused by name.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"

# Keys that are read here, or say nothing about what the adapter computes.
_KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern"}
_KNOWN |= {"alpha_pattern", "layers_to_transform", "layers_pattern", "base_model_name_or_path"}
_KNOWN |= {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}
_KNOWN |= {"megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"}
# The one value of a key that can be computed; of every other key, an empty value.
_ONLY: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
# Ways to begin that leave the base as it is; pissa, olora, corda and loftq change it.
_ONLY["init_lora_weights"] = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Placement:
    """What one layer gets: the rank of A and B, and the numerator of their scale."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a model: `placed` by the layer's path.

    base is the base's folder, base_fingerprint what `fingerprint` gives for it, if known;
    block_size that of a base which was packed in 4 bits when the adapters were trained on it.
    """

    placed: Mapping[str, Placement]
    use_rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    base_fingerprint: str | None = None
    block_size: int | None = None

    def scale(self, path: str) -> float:
        """What B A of a layer is multiplied by."""
        place = self.placed[path]
        return place.alpha / (math.sqrt(place.rank) if self.use_rslora else place.rank)

    def summary(self) -> str:
        """Ranks, numerators and layers, for messages."""
        kinds = {f"rank {place.rank}, alpha {place.alpha:g}" for place in self.placed.values()}
        names = {path.rpartition(".")[2] for path in self.placed}
        rslora = ", use_rslora" if self.use_rslora else ""
        return f"{'; '.join(sorted(kinds))}{rslora} on {', '.join(sorted(names))}"


def placement(found: Mapping[str, Any], path: str) -> Placement:
    """What a layer gets by the parsed file."""
    rank = _of_pattern(found.get("rank_pattern"), path, found.get("r", 8))
    alpha = _of_pattern(found.get("alpha_pattern"), path, found.get("lora_alpha", 8))
    return Placement(int(rank), float(alpha))


def targets(found: Mapping[str, Any], path: str) -> bool:
    """Whether target_modules and layers_to_transform choose a layer, as PEFT decides it."""
    names = found.get("target_modules") or ()
    if isinstance(names, str):
        return names.lower() == "all-linear" or bool(re.fullmatch(names, path))
    layers = found.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or ()
    if numbers and int(path.split(".")[2]) not in numbers:
        return False
    return any(path == name or path.endswith(f".{name}") for name in names)


def to_peft(config: AdapterConfig, layers: Collection[str]) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, and patterns for other layers."""
    rank = Counter(place.rank for place in config.placed.values()).most_common(1)[0][0]
    alpha = Counter(place.alpha for place in config.placed.values()).most_common(1)[0][0]
    names = {path.rpartition(".")[2] for path in config.placed}
    everywhere = {path for path in layers if path.rpartition(".")[2] in names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
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


def unsupported(found: Mapping[str, Any]) -> Iterator[str]:
    """What the parsed file asks for that cannot be computed here, one problem each."""
    for key, value in found.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                yield f"{key}: got {value!r}, must be {_ONLY[key][0]!r}: nothing else is supported"
        elif key not in _KNOWN and value not in (None, False, [], {}, ""):
            yield f"{key}: got {value!r}, must be absent or empty: it is not supported"
    pattern = found.get("layers_pattern")
    if pattern not in (None, [], "", "layers", ["layers"]):
        yield f"layers_pattern: got {pattern!r}, must be 'layers'"
    if found.get("layers_to_transform") is not None and isinstance(
        found.get("target_modules"), str
    ):
        yield "layers_to_transform: must be absent where target_modules is one expression"
    yield from _wrong_numbers(found)
    if isinstance(names := found.get("target_modules"), str) and not _is_expression(names):
        yield f"target_modules: got {names!r}, must be a regular expression or a list of names"


def _wrong_numbers(found: Mapping[str, Any]) -> Iterator[str]:
    """Ranks and numerators, and the patterns of layers that have others, that cannot be used."""
    for key, pattern, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", (int, float)),
    ):
        word = "an integer" if kind is int else "a finite number"
        values = {key: found.get(key, 8)}
        for layers, value in (found.get(pattern) or {}).items():
            values[f"{pattern}.{layers}"] = value
            if not _is_expression(layers):
                yield f"{pattern}: got {layers!r}, must be a regular expression"
        for place, value in values.items():
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not (good and 0 < value < math.inf):
                yield f"{place}: got {value!r}, must be {word} above 0"


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _of_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a path, as PEFT matches it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
