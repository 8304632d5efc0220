"""The JSON files of a Hugging Face LLaMA folder: config.json, generation_config.json, tokenizer.

transformers 5 moved rope_theta into `rope_parameters` and torch_dtype to `dtype`: both forms are
written and both are read. What this package cannot compute is refused by name, never ignored.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError

# Hugging Face's names of our fields; the second group may be absent, and then means its default.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_OPTIONAL = {
    "num_key_value_heads": ("num_kv_heads", None),
    "max_position_embeddings": ("max_seq_len", 2048),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
# Fields with one value that this package computes; an absent one has that value.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_DEFAULT_THETA = 10000.0

Ids = int | Sequence[int] | None


def config_to_hf(config: LlamaConfig, bos_id: Ids, eos_id: Ids, dtype: str) -> dict[str, Any]:
    """What config.json says of a model whose weights are stored as `dtype` ("float32", ...)."""
    ours = {key: getattr(config, field) for key, field in _REQUIRED.items()}
    ours |= {key: getattr(config, field) for key, (field, _) in _OPTIONAL.items()}
    return {
        **ours,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "use_cache": True,
    }


def config_from_hf(found: Mapping[str, Any], source: str) -> LlamaConfig:
    """The model that a parsed config.json describes; `source` is the file's name for messages.

    Raises ConfigError with every problem, one a line.
    """
    theta, problems = _rope_theta(found)
    problems = [*_unsupported(found), *problems]
    problems += [f"{key}: missing" for key in _REQUIRED if found.get(key) is None]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    fields = {field: found[key] for key, field in _REQUIRED.items()}
    for key, (field, default) in _OPTIONAL.items():
        fields[field] = default if found.get(key) is None else found[key]
    try:
        config = LlamaConfig(**fields, rope_theta=theta)
    except ConfigError as error:
        raise ConfigError(
            "\n".join(f"{source}: {line}" for line in str(error).split("\n"))
        ) from None
    if found.get("head_dim") not in (None, config.head_dim):
        raise ConfigError(
            f"{source}: head_dim: got {found['head_dim']}, must be hidden_size / "
            f"num_attention_heads = {config.head_dim}"
        )
    return config


def generation_config(bos_id: Ids, eos_id: Ids) -> dict[str, Any]:
    """What generation_config.json says: where `generate` of transformers starts and stops."""
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    return {key: value for key, value in ids.items() if value is not None}


def tokenizer_config(max_seq_len: int) -> dict[str, Any]:
    """tokenizer_config.json for a SentencePiece tokenizer.model with the usual special pieces."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": max_seq_len,
    }


def special_ids(folder: Path, found: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """(BOS id, stop ids) of a folder: generation_config.json's, else those of config.json."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    bos, eos = (
        found.get(key) if generation.get(key) is None else generation[key]
        for key in ("bos_token_id", "eos_token_id")
    )
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(stop) is int for stop in stops) or not (bos is None or type(bos) is int):
        raise ConfigError(f"{folder}: bos_token_id {bos!r}, eos_token_id {eos!r}: must be integers")
    return bos, tuple(stops)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ConfigError that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return value


def _unsupported(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("model_type") != "llama":
        yield f"model_type: got {found.get('model_type')!r}, must be 'llama'"
    for key, only in _ONLY.items():
        value = found.get(key)
        if value is not None and value != only:
            allowed = "absent" if only is None else repr(only)
            yield f"{key}: got {value!r}, must be {allowed}: nothing else can be computed here"


def _rope_theta(found: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """(base of the rotary frequencies, problems), from either form of the file."""
    problems: list[str] = []
    thetas = {"rope_theta": found.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        form = found.get(key) or {}
        kind = (
            form.get("rope_type", form.get("type", "default")) if isinstance(form, dict) else form
        )
        if not isinstance(form, dict) or kind != "default":
            problems.append(f"{key}: got {kind!r}, must be 'default': no scaling can be computed")
            continue
        if form.get("partial_rotary_factor") not in (None, 1.0):
            factor = form["partial_rotary_factor"]
            problems.append(f"{key}.partial_rotary_factor: got {factor!r}, must be 1.0")
        if nested := [name for name, value in form.items() if isinstance(value, dict)]:
            problems.append(f"{key}: got one for each of {nested}, must be one for all layers")
        thetas[f"{key}.rope_theta"] = form.get("rope_theta")
    stated = {key: theta for key, theta in thetas.items() if theta is not None}
    if len(set(map(repr, map(_as_float, stated.values())))) > 1:
        problems.append(f"rope_theta: got {stated}, which contradict each other")
    return next(iter(stated.values()), _DEFAULT_THETA), problems


def _as_float(value: Any) -> Any:
    """10000 and 10000.0 are the same base."""
    return float(value) if type(value) is int else value
