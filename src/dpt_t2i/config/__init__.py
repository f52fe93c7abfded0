"""Typed settings: one frozen model a command, sections inside, every leaf's name unique within a command.

A value comes from, in rising order: the default below, the YAML file of `--config`, a dotted override
(`train.learning_rate=1e-4`) or the flag of the same leaf (`--learning_rate 1e-4`).
An unknown key is an error that names the nearest known one. All three hand over text, which the leaf's own type
reads: `no` is a word to `mixed_precision` and false to `gradient_checkpointing`.
"""

from dpt_t2i.config.commands import (
    AlignmentConfig,
    CacheConfig,
    DemoConfig,
    DiscriminationConfig,
    DoctorConfig,
    ExportConfig,
    GenerateConfig,
    ImportOfficialConfig,
    MineConfig,
    PerturbConfig,
    ProbeConfig,
    ScoreConfig,
    TuneConfig,
)
from dpt_t2i.config.reading import (
    ALIASES,
    ConfigT,
    build_config,
    is_optional,
    is_tuple,
    leaves,
    resolve_key,
    save_config,
)
from dpt_t2i.config.sections import (
    AdapterConfig,
    CorrectionConfig,
    DataConfig,
    DenoiseConfig,
    ItmRecConfig,
    LoraSettings,
    ModelConfig,
    SampleConfig,
    SearchConfig,
    Section,
    TrainConfig,
    TrainDataConfig,
    TrainModelConfig,
    TuneTrainConfig,
)

__all__ = [
    "ALIASES",
    "AdapterConfig",
    "AlignmentConfig",
    "CacheConfig",
    "ConfigT",
    "CorrectionConfig",
    "DataConfig",
    "DemoConfig",
    "DenoiseConfig",
    "DiscriminationConfig",
    "DoctorConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportOfficialConfig",
    "ItmRecConfig",
    "LoraSettings",
    "MineConfig",
    "ModelConfig",
    "PerturbConfig",
    "ProbeConfig",
    "SampleConfig",
    "ScoreConfig",
    "SearchConfig",
    "Section",
    "TrainConfig",
    "TrainDataConfig",
    "TrainModelConfig",
    "TuneConfig",
    "TuneTrainConfig",
    "build_config",
    "is_optional",
    "is_tuple",
    "leaves",
    "resolve_key",
    "save_config",
]
