"""Configuration: a TOML file and `--set section.key=value` overrides become one frozen Config."""

from tinyllama.config.config import (
    SECTIONS,
    Config,
    defaults_notice,
    option_help,
    option_table,
)
from tinyllama.config.loader import config_from_toml, load_config
from tinyllama.config.rope_scaling import RopeScaling
from tinyllama.config.sections import (
    ALL_LINEAR,
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
)

__all__ = [
    "ALL_LINEAR",
    "SECTIONS",
    "CheckpointingConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "LRScheduleConfig",
    "LlamaConfig",
    "LoraConfig",
    "ObserveConfig",
    "PreferenceConfig",
    "QloraConfig",
    "RopeScaling",
    "TrainingConfig",
    "config_from_toml",
    "defaults_notice",
    "load_config",
    "option_help",
    "option_table",
]
