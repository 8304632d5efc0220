"""Config: all sections of a configuration together, and how they are written as TOML and tables.

The options with their limits and defaults are in sections.py; loader.py makes a Config from a file
and overrides.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tinyllama.config.options import (
    got,
    markdown_rows,
    options_of,
    problems_of,
    shown,
    text_rows,
    to_toml,
)
from tinyllama.config.sections import (
    RELATIONS,
    CheckpointingConfig,
    DataConfig,
    DistillationConfig,
    LlamaConfig,
    LoraConfig,
    LRScheduleConfig,
    ObserveConfig,
    PreferenceConfig,
    QloraConfig,
    TrainingConfig,
    checkable,
)
from tinyllama.errors import ConfigError

SECTIONS: dict[str, type] = {
    "model": LlamaConfig,
    "training": TrainingConfig,
    "lr_schedule": LRScheduleConfig,
    "data": DataConfig,
    "preference": PreferenceConfig,
    "distillation": DistillationConfig,
    "checkpointing": CheckpointingConfig,
    "observe": ObserveConfig,
    "lora": LoraConfig,
    "qlora": QloraConfig,
}
OPTIONAL_SECTIONS = ("lora", "qlora")
# Keys of [model] that may differ from those of a base checkpoint; the others are shapes of its
# weights.
OVERRIDABLE = ("max_seq_len", "rope_theta", "rope_scaling", "sliding_window", "rms_norm_eps")


@dataclass(frozen=True)
class Config:
    """A whole configuration. Raises ConfigError when its sections do not fit each other.

    `given` maps each key that was set, and is no default, to the file or override that set it.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    lora: LoraConfig | None = None
    qlora: QloraConfig | None = None
    given: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = self.values()
        problems = problems_of(RELATIONS, checkable(values))
        problems += section_problems(values)
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def context_length(self) -> int:
        """Tokens per training sequence: data.context_length, or else model.max_seq_len."""
        return self.data.context_length or self.model.max_seq_len

    @property
    def tokenizer_source(self) -> str:
        """A tokenizer's path, or "train"; by default the base's path, or "train" without a base."""
        return self.data.tokenizer or self.model.base or "train"

    @property
    def tokenizer_vocab_size(self) -> int:
        """Vocabulary of a tokenizer that is trained: tokenizer_vocab_size, or else the model's."""
        return self.data.tokenizer_vocab_size or self.model.vocab_size

    def where(self, key: str) -> str:
        """How a message names an option: by the override or file that set it, else by its key."""
        return self.given.get(key, key)

    def to_toml(self) -> str:
        """TOML that loads as an equal Config: every key that is not None."""
        sections = ((name, getattr(self, name)) for name in SECTIONS)
        return "\n".join(_section_text(name, s) for name, s in sections if s is not None)

    def with_base(self, base: LlamaConfig, source: str) -> "Config":
        """This configuration with the sizes `base` of its base checkpoint, read from `source`.

        A size that was set must be the checkpoint's. Those of OVERRIDABLE may be set to other
        values. Raises ConfigError.
        """
        sizes = asdict(base) | {"num_kv_heads": base.kv_heads, "base": self.model.base}
        problems = []
        for key, name, default, _, _ in options_of("model", LlamaConfig):
            mine = getattr(self.model, name)
            if key not in self.given and mine == default:
                continue
            if name in OVERRIDABLE:
                sizes[name] = mine
                if name == "rope_scaling" and mine is not None:
                    sizes[name] = mine.trained_on(_trained_length(base))
            elif mine != sizes[name]:
                must_be = f"{shown(sizes[name])} as in {source}"
                problems.append(f"{self.where(key)}: {got(mine, must_be)}")
        config = replace(self, model=LlamaConfig(**sizes))
        problems += problems_of(RELATIONS, config.values())
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def overridden(self, base: LlamaConfig, source: str) -> list[str]:
        """One line for each value of a base, as read from `source`, that this one overrides."""
        return [
            f"{self.where(f'model.{name}')}: {shown(getattr(self.model, name))} is used instead of "
            f"{shown(getattr(base, name))}, which {source} has"
            for name in OVERRIDABLE
            if getattr(self.model, name) != getattr(base, name)
        ]

    def values(self) -> dict[str, Any]:
        """Every option of every section that is present, by dotted key."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {
            option.key: getattr(section, option.name)
            for name, section in sections.items()
            if section is not None
            for option in options_of(name, SECTIONS[name])
        }


def defaults_notice(config: Config) -> str | None:
    """What to say where neither a size of the model nor a base was set: the defaults are large."""
    own = {option.key for option in options_of("model", LlamaConfig)}
    if own & config.given.keys():
        return None
    batch = ""
    if not {"training.batch_size", "training.micro_batch_size"} & config.given.keys():
        batch = f" on {config.training.batch_size} x {config.context_length} tokens per step"
    return (
        "the configuration sets neither sizes of [model] nor model.base: this trains the sizes of"
        f" 124m{batch}; set model.hidden_size, model.num_layers, ... or model.base"
        + (", and training.batch_size" if batch else "")
    )


def option_table() -> str:
    """Every option as a Markdown table, for docs/options.md."""
    lines = ["| key | default | allowed | what it is |", "|---|---|---|---|"]
    for name, cls in SECTIONS.items():
        lines += markdown_rows(options_of(name, cls))
    return "\n".join(lines) + "\n"


def option_help() -> str:
    """Every option as text for a terminal: key and default, then what it is and what is allowed."""
    lines = []
    for name, cls in SECTIONS.items():
        lines += [f"[{name}]", *text_rows(options_of(name, cls)), ""]
    return "\n".join(lines)


def section_problems(values: dict[str, Any]) -> list[str]:
    """A packed base has no gradients, so without adapters nothing could be trained."""
    if values.get("qlora.quantize_base") and "lora.rank" not in values:
        return ["[qlora] packs a base for adapters: add a [lora] section, or remove [qlora]"]
    return []


def _trained_length(base: LlamaConfig) -> int:
    """Tokens of the rows that a model was first trained on."""
    stated = base.scaling and base.scaling.original_max_position_embeddings
    return stated or base.max_seq_len


def _section_text(name: str, section: Any) -> str:
    pairs = (
        (o.key.rpartition(".")[2], getattr(section, o.name))
        for o in options_of(name, SECTIONS[name])
    )
    lines = [f"{key} = {to_toml(value)}\n" for key, value in pairs if value is not None]
    return "".join([f"[{name}]\n", *lines])
