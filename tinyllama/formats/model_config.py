"""config.json of a Hugging Face folder, in and out.

LLaMA's architecture goes by several model types, which differ in what their files leave out:

    llama      LLaMA 1 to 3, TinyLlama, SmolLM2, Yi, CodeLlama; internlm3, iquestcoder likewise
    mistral    with a sliding window; ministral too, where all its layers have it or none
    qwen2      with biases of q, k and v
    seed_oss   with biases of q, k and v, or of o as well

A type that is not here, and whatever else cannot be computed, is refused by name. Rotary
frequencies are read in both spellings, that of transformers 4 (rope_theta, rope_scaling) and that
of transformers 5 (rope_parameters), and written in both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tinyllama.config import LlamaConfig, RopeScaling
from tinyllama.config.options import shown
from tinyllama.errors import ConfigError
from tinyllama.system.untrusted import place_first, printable, some_of

Ids = int | Sequence[int] | None

# Hugging Face's names of our fields; the second group may be absent, and then means its default.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_OPTIONAL = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "mlp_bias": "mlp_bias",
}
# Fields of which this package supports one value; an absent one has that value.
_ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}
_DEFAULT_THETA = 10000.0


def _llama_bias(values: Mapping[str, Any]) -> Any:
    return values.get("attention_bias", False)


def _seed_bias(values: Mapping[str, Any]) -> Any:
    inner, out = values.get("attention_bias", True), values.get("attention_out_bias", False)
    if type(inner) is not bool or type(out) is not bool or (out and not inner):
        raise ConfigError(
            f"attention_bias, attention_out_bias: got {shown(inner)}, {shown(out)}, must be true "
            "or false, and the second false where the first is"
        )
    return True if out else "qkv" if inner else False


def _no_window(values: Mapping[str, Any]) -> Any:
    return None


def _window(values: Mapping[str, Any]) -> Any:
    """The sliding window, where all layers have it; `layer_types` may say that none has."""
    window = values.get("sliding_window", 4096)
    types = values.get("layer_types")
    if window is None or not isinstance(types, list) or "full_attention" not in types:
        return window
    return _none_or_mixed(all(name == "full_attention" for name in types), "layer_types")


def _qwen_window(values: Mapping[str, Any]) -> Any:
    if not values.get("use_sliding_window", False) or values.get("sliding_window", 4096) is None:
        return None
    if isinstance(values.get("layer_types"), list):
        return _window(values)
    first, layers = values.get("max_window_layers", 28), values.get("num_hidden_layers")
    if first == 0 or type(first) is not int or type(layers) is not int:
        return _window(values)
    return _none_or_mixed(first >= layers, "max_window_layers")


def _none_or_mixed(none: bool, key: str) -> None:
    if not none:
        raise ConfigError(
            f"{key}: some layers have a sliding window and some have none: must be the same in all"
        )


@dataclass(frozen=True)
class _Kind:
    """A model type: its class in transformers, how it states biases and window, its defaults."""

    architecture: str
    attention_bias: Callable[[Mapping[str, Any]], Any] = _llama_bias
    window: Callable[[Mapping[str, Any]], Any] = _no_window
    has_mlp_bias: bool = True
    # Values that an absent key stands for, where they are not those of llama.
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LONG = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_WIDE = {"rms_norm_eps": 1e-5, "head_dim": 128}
_KINDS = {
    "llama": _Kind("LlamaForCausalLM"),
    "mistral": _Kind("MistralForCausalLM", lambda values: False, _window, False, _LONG),
    "ministral": _Kind("MinistralForCausalLM", lambda values: False, _window, False, _LONG),
    "qwen2": _Kind(
        "Qwen2ForCausalLM",
        lambda values: "qkv",
        _qwen_window,
        False,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    "seed_oss": _Kind(
        "SeedOssForCausalLM",
        _seed_bias,
        defaults={"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "internlm3": _Kind(
        "LlamaForCausalLM",
        lambda values: values.get("qkv_bias", values.get("attention_bias", False)),
        defaults=_WIDE | {"max_position_embeddings": 32768, "num_key_value_heads": 2},
    ),
    "iquestcoder": _Kind("LlamaForCausalLM", defaults=_WIDE | _LONG),
}
# Keys that this package writes, whatever the base says.
_OWN = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
_OWN |= {"layer_types", "max_window_layers", "auto_map", "_name_or_path"}


def config_from_hf(values: Mapping[str, Any], source: str) -> LlamaConfig:
    """The model that a parsed config.json describes; `source` is the file's name for messages.

    Raises ConfigError with every problem, one per line.
    """
    kind = _KINDS.get(values["model_type"]) if isinstance(values.get("model_type"), str) else None
    problems = list(_unsupported(values))
    if kind is None:
        raise ConfigError(some_of([*problems, *_missing(values)], source))
    theta, scaling, more = _rotary(values)
    problems += [*more, *_missing(values)]
    fields = {field: values.get(key) for key, field in _REQUIRED.items()}
    with_defaults = _LLAMA_DEFAULTS | dict(kind.defaults) | dict(values)
    fields |= {f: with_defaults[key] for key, f in _OPTIONAL.items() if key in with_defaults}
    try:
        fields |= {"attention_bias": kind.attention_bias(values)}
        fields |= {"sliding_window": kind.window(values)}
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(some_of(problems, source))
    stated = {field: value for field, value in fields.items() if value is not None}
    present = {"rms_norm_eps": 1e-6, **stated}
    return _checked(present | {"rope_theta": theta, "rope_scaling": scaling}, kind, source)


def _checked(fields: dict[str, Any], kind: _Kind, source: str) -> LlamaConfig:
    """The configuration, with the lengths that scaled frequencies depend on."""
    if not kind.has_mlp_bias:
        fields["mlp_bias"] = False
    try:
        config = LlamaConfig(**fields)
        if config.head_size is not None and config.head_size * config.num_heads == (
            config.hidden_size
        ):
            config = replace(config, head_size=None)
        return _with_lengths(config)
    except ConfigError as error:
        raise ConfigError(some_of(str(error).split("\n"), source)) from None


def _with_lengths(config: LlamaConfig) -> LlamaConfig:
    """With the length of the first training stated, and the longest row that dynamic scaling is
    for, which Hugging Face's files do not name."""
    scaling, longest = config.rope_scaling, config.max_seq_len
    if scaling is None:
        return config
    if scaling.rope_type == "dynamic":  # transformers counts from max_position_embeddings
        scaling = msgspec.structs.replace(scaling, original_max_position_embeddings=None)
        longest = min(int(longest * scaling.factor), 2**31 - 1)
    stated = scaling.trained_on(config.max_seq_len)
    return replace(config, rope_scaling=stated, max_seq_len=longest)


def _missing(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}: missing" for key in _REQUIRED if values.get(key) is None]


def _unsupported(values: Mapping[str, Any]) -> Iterator[str]:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        yield f"model_type: got {printable(repr(kind))}, must be one of {known}"
    for key, only in _ONLY.items():
        value = values.get(key)
        if value is not None and value != only:
            allowed = "absent" if only is None else repr(only)
            got = printable(repr(value))
            yield f"{key}: got {got}, must be {allowed}: nothing else can be computed here"


def _rotary(values: Mapping[str, Any]) -> tuple[Any, RopeScaling | None, list[str]]:
    """(base of the rotary frequencies, their scaling, problems), from either form of the file."""
    problems: list[str] = []
    thetas = {"rope_theta": values.get("rope_theta")}
    scalings: list[RopeScaling] = []
    for key in ("rope_parameters", "rope_scaling"):
        form = values.get(key)
        if not form:
            continue
        if not isinstance(form, dict):
            problems.append(f"{key}: got {printable(repr(form))}, must be an object")
        elif nested := [printable(name) for name, value in form.items() if isinstance(value, dict)]:
            problems.append(f"{key}: got one for each of {nested}, must be one for all layers")
        else:
            thetas[f"{key}.rope_theta"] = form.get("rope_theta")
            try:
                scalings.append(_scaling(form, values))
            except ConfigError as error:
                problems.append(f"{key}{error}")
    stated = {key: theta for key, theta in thetas.items() if theta is not None}
    if len(set(map(repr, map(_as_float, stated.values())))) > 1:
        problems.append(f"rope_theta: got {printable(stated)}, which contradict each other")
    if len(set(scalings)) > 1:
        problems.append("rope_parameters, rope_scaling: contradict each other")
    theta = next(iter(stated.values()), _DEFAULT_THETA)
    return theta, scalings[0] if scalings else None, problems


_LEFT_OUT = ("type", "rope_theta", "partial_rotary_factor", "mrope_section")


def _scaling(form: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    """The scaling of one form. Raises ConfigError that begins with ".KEY: " or ": "."""
    if form.get("partial_rotary_factor") not in (None, 1.0):
        factor = printable(repr(form["partial_rotary_factor"]))
        raise ConfigError(f".partial_rotary_factor: got {factor}, must be 1.0")
    kind = form.get("rope_type", form.get("type", "default"))
    if kind == "default":
        return RopeScaling("default")
    fields = {k: v for k, v in form.items() if v is not None and k not in _LEFT_OUT}
    trained = fields.get("original_max_position_embeddings")
    if trained is None and kind in ("yarn", "llama3"):
        trained = values.get("original_max_position_embeddings")
        if trained is not None:
            fields["original_max_position_embeddings"] = trained
    if "factor" not in fields and kind == "yarn" and type(trained) is int and trained > 0:
        longest = values.get("max_position_embeddings")
        if type(longest) is int:
            fields["factor"] = longest / trained
    elif "factor" not in fields:
        raise ConfigError(".factor: missing")
    try:
        return msgspec.convert({**fields, "rope_type": kind}, RopeScaling)
    except msgspec.ValidationError as error:
        got = printable(repr(kind))
        raise ConfigError(f": got {got}, cannot be computed: {place_first(error)}") from error


def _as_float(value: Any) -> Any:
    """10000 and 10000.0 are the same base."""
    return float(value) if type(value) is int and abs(value) < 1 << 64 else value


def one_or_list(ids: Ids) -> int | list[int] | None:
    """A single id as a number, several as a list."""
    several = [] if ids is None else [ids] if isinstance(ids, int) else [*ids]
    return several[0] if len(several) == 1 else several or None


def config_to_hf(
    config: LlamaConfig,
    bos_id: Ids,
    eos_id: Ids,
    dtype: str,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a model whose weights are stored as `dtype` ("float32", ...).

    Of the config.json of its base, keys that say nothing about the model's computation are kept,
    and the model type where that can hold the configuration.
    """
    base = base or {}
    kind = _kind_for(config, base.get("model_type"))
    ours = {key: getattr(config, field) for key, field in _REQUIRED.items()}
    ours |= {key: getattr(config, field) for key, field in _OPTIONAL.items()}
    kept = {key: value for key, value in base.items() if key not in _OWN}
    default = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    return {
        **default,
        **kept,
        **ours,
        **_rotary_to_hf(config),
        **_window_and_biases(config, kind),
        "architectures": [_KINDS[kind].architecture],
        "model_type": kind,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": one_or_list(eos_id),
    }


def _kind_for(config: LlamaConfig, wanted: object) -> str:
    """The wanted model type, if files of it can say all that the configuration does."""
    holding = ["mistral", "ministral"]
    if config.attention_bias == "qkv":
        holding = ["qwen2"] if not config.mlp_bias else []
        holding += ["seed_oss"] if config.sliding_window is None else []
    elif config.attention_bias or config.mlp_bias:
        holding = ["llama", "seed_oss"]
    elif config.sliding_window is None:
        holding = ["llama", "mistral", "ministral"]
    if config.sliding_window is None and (config.attention_bias is True) == config.mlp_bias:
        holding += ["internlm3", "iquestcoder"] if config.attention_bias != "qkv" else []
    if wanted in holding and isinstance(wanted, str):
        return wanted
    return holding[0]


def _window_and_biases(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """What a model type says about its sliding window and biases."""
    window, bias = config.sliding_window, config.attention_bias
    if kind in ("mistral", "ministral"):
        return {"sliding_window": window}
    if kind == "qwen2":
        # All layers from this one on have the window.
        first = config.num_layers if window is None else 0
        on = {"use_sliding_window": window is not None, "max_window_layers": first}
        return {"sliding_window": window, **on}
    if kind == "seed_oss":
        biases = {"attention_bias": bool(bias), "attention_out_bias": bias is True}
        return {**biases, "mlp_bias": config.mlp_bias}
    if kind == "internlm3":
        return {"qkv_bias": bias, "bias": config.mlp_bias}
    return {"attention_bias": bias, "mlp_bias": config.mlp_bias}


def _rotary_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Base, scaling and longest row, in the spellings of transformers 4 and 5."""
    theta, scaling = config.rope_theta, config.scaling
    written: dict[str, Any] = {"rope_theta": theta, "max_position_embeddings": config.max_seq_len}
    if scaling is None:
        plain = {"rope_type": "default", "rope_theta": theta}
        return {**written, "rope_scaling": None, "rope_parameters": plain}
    form = scaling.stated()
    if scaling.rope_type == "dynamic":  # transformers counts from max_position_embeddings
        written["max_position_embeddings"] = form.pop("original_max_position_embeddings")
    return {**written, "rope_scaling": form, "rope_parameters": {**form, "rope_theta": theta}}
