"""Log-prob, entropy and policy losses of large-vocabulary language models without the logits; see README.md."""

from . import diagnostics
from .errors import BackendUnavailable, EapoError, ShapeError
from .loss import EAPOLoss, eapo_loss, policy_loss
from .objectives.config import EAPOConfig
from .objectives.controllers import EntropyRatio
from .objectives.denominator import idle_sequences, loss_denominator
from .objectives.methods import METHODS, Method, get_method, make_controller
from .objectives.semantic import majority_rewards, semantic_rewards
from .objectives.token_weights.gather import GatheredStep, gather_step
from .objectives.token_weights.step import observed_entropy, weight_tokens
from .ops.dispatch import available_backends
from .ops.nucleus import nucleus_entropy
from .ops.token_stats import token_stats
from .ops.vocab_shard import VocabShard
from .support import TokenSupport
from .types import LossOutput, Options, TokenBatch, TokenStats

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BackendUnavailable",
    "EAPOConfig",
    "EAPOLoss",
    "EapoError",
    "EntropyRatio",
    "GatheredStep",
    "LossOutput",
    "Method",
    "Options",
    "ShapeError",
    "TokenBatch",
    "TokenStats",
    "TokenSupport",
    "VocabShard",
    "available_backends",
    "diagnostics",
    "eapo_loss",
    "gather_step",
    "get_method",
    "idle_sequences",
    "loss_denominator",
    "majority_rewards",
    "make_controller",
    "nucleus_entropy",
    "observed_entropy",
    "policy_loss",
    "semantic_rewards",
    "token_stats",
    "weight_tokens",
]
