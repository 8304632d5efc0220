"""A whole configuration: its sections, what they are together, and how they are written out.

The options themselves, their limits and defaults are the dataclasses of sections.py; loader.py
makes a Config of a file and overrides.
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
    LlamaConfig,
    LoraConfig,
    LRScheduleConfig,
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
    "checkpointing": CheckpointingConfig,
    "lora": LoraConfig,
    "qlora": QloraConfig,
}
OPTIONAL_SECTIONS = ("lora", "qlora")
# The keys of [model] that may differ from those of a base, whose weights fit any value of them;
# the others are its shapes.
OVERRIDABLE = ("max_seq_len", "rope_theta", "rms_norm_eps")


@dataclass(frozen=True)
class Config:
    """A whole configuration; raises ConfigError when its sections do not fit each other.

    `given` has the keys that were set, as against defaults, and what set them: a file or override.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
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
        """Tokens a training sequence: data.context_length, or all that the model can take."""
        return self.data.context_length or self.model.max_seq_len

    @property
    def tokenizer_source(self) -> str:
        """A tokenizer's path, or "train"; where none is set, the base's own if there is a base."""
        return self.data.tokenizer or self.model.base or "train"

    @property
    def tokenizer_vocab_size(self) -> int:
        """Vocabulary of a tokenizer that is trained: its own size, or that of the model."""
        return self.data.tokenizer_vocab_size or self.model.vocab_size

    def where(self, key: str) -> str:
        """What a message calls an option: the override or the file that set it, else its key."""
        return self.given.get(key, key)

    def to_toml(self) -> str:
        """TOML that loads as an equal Config: every key but those that are not set."""
        sections = ((name, getattr(self, name)) for name in SECTIONS)
        return "\n".join(_section_text(name, s) for name, s in sections if s is not None)

    def with_base(self, found: LlamaConfig, source: str) -> "Config":
        """This configuration with the sizes of its base checkpoint, as read from `source`.

        A size that was set must be the checkpoint's; max_seq_len, rope_theta and rms_norm_eps may
        differ, and are the checkpoint's only where they were not set. Raises ConfigError.
        """
        sizes = asdict(found) | {"num_kv_heads": found.kv_heads, "base": self.model.base}
        problems = []
        for key, name, default, _, _ in options_of("model", LlamaConfig):
            mine = getattr(self.model, name)
            if key not in self.given and mine == default:
                continue
            if name in OVERRIDABLE:
                sizes[name] = mine
            elif mine != sizes[name]:
                must_be = f"{shown(sizes[name])} as in {source}"
                problems.append(f"{self.where(key)}: {got(mine, must_be)}")
        config = replace(self, model=LlamaConfig(**sizes))
        problems += problems_of(RELATIONS, config.values())
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def overridden(self, found: LlamaConfig, source: str) -> list[str]:
        """One line for each value of a base, as read from `source`, that this one overrides."""
        return [
            f"{self.where(f'model.{name}')}: {shown(getattr(self.model, name))} is used instead of "
            f"{shown(getattr(found, name))}, which {source} has"
            for name in OVERRIDABLE
            if getattr(self.model, name) != getattr(found, name)
        ]

    def values(self) -> dict[str, Any]:
        """Every option of every section that is there, by dotted key."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {
            option.key: getattr(section, option.name)
            for name, section in sections.items()
            if section is not None
            for option in options_of(name, SECTIONS[name])
        }


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
    """A packed base takes no gradients, so without adapters nothing could be trained."""
    if values.get("qlora.quantize_base") and "lora.rank" not in values:
        return ["[qlora] packs a base for adapters: add a [lora] section, or leave it out"]
    return []


def _section_text(name: str, section: Any) -> str:
    pairs = ((o.name, getattr(section, o.name)) for o in options_of(name, SECTIONS[name]))
    lines = [f"{key} = {to_toml(value)}\n" for key, value in pairs if value is not None]
    return "".join([f"[{name}]\n", *lines])
