"""The configuration: a tree of settings, read from TOML and the command line."""

from .loss import EntropyWeightConfig, LossConfig
from .model import ColumnsConfig, DataConfig, LoraConfig, ModelConfig
from .rewards import JudgeConfig, RewardModelConfig, RewardsConfig
from .run import CheckpointConfig, EvalConfig, LogConfig, OptimConfig
from .sampling import RolloutConfig, VllmConfig
from .tree import Config

__all__ = [
    "CheckpointConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EntropyWeightConfig",
    "EvalConfig",
    "JudgeConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "RolloutConfig",
    "VllmConfig",
]
