"""The switches of a policy loss, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import is_number, require, require_choice, require_number
from .advantages import ADVANTAGES, SPLITS, Advantage
from .reductions import REDUCTIONS
from .surrogates import KL_ESTIMATORS, SEQUENCE_RATIO, SURROGATES, Clip, Surrogate


@dataclass(frozen=True)
class EAPOConfig:
    """A policy loss without the weight of the positives (docs/math.md E9, E10).

    Attributes:
        clip_low: the ratio's lower bound is 1 - clip_low.
        clip_high: the ratio's upper bound is 1 + clip_high.
        dual_clip: c > 1 bounds the loss of a negative advantage by c * |A| (ppo_clip and gspo), or
            None.
        surrogate: "reinforce", "ppo_clip", "unclipped", "balanced_clip", "cispo", "gspo" (sequence
            ratio), or a function like those of ``surrogates``.
        advantage: "group_norm", "group_mean", "sign", "batch_norm", "binary", or a function like
            those of ``advantages``.
        split: what makes a response positive: its reward above the mean of its "group" or of the
            "batch", or the sign of its "advantage".
        reduction: "token_mean", "seq_mean_token_mean", "seq_mean_token_sum" or "fixed_length".
        fixed_length: constant number of tokens for reduction "fixed_length".
        negative_weight: factor on the responses that are not positive.
        drop_zero_weight: mask responses of weight zero; they leave the denominators too.
        kl_coef: factor of the KL penalty to ``ref_logp`` (nats per token).
        kl_estimator: "k1", "k2" or "k3".
        entropy_coef: factor of the entropy bonus (loss per nat).
        entropy_top_p: the bonus is on the entropy of the renormalised nucleus of this mass, in (0,
            1), instead of the whole distribution's; autograd schedule only. None: whole.
        importance_cap: truncates exp(old_logp - rollout_logp), the weight of the policy term for
            tokens whose rollout engine disagrees with the trainer; None: no correction.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    surrogate: str | Surrogate = "ppo_clip"
    advantage: str | Advantage = "group_norm"
    split: str = "group"
    reduction: str = "token_mean"
    fixed_length: int | None = None
    negative_weight: float = 1.0
    drop_zero_weight: bool = False
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    entropy_top_p: float | None = None
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        _choice_or_function("surrogate", self.surrogate, SURROGATES)
        _choice_or_function("advantage", self.advantage, ADVANTAGES)
        require_choice("split", self.split, SPLITS)
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        ok = isinstance(self.drop_zero_weight, bool)
        require(ok, "drop_zero_weight", "True or False", repr(self.drop_zero_weight))
        require_number("clip_low", self.clip_low, 0, 1)
        require_number("clip_high", self.clip_high, 0)
        require_number("negative_weight", self.negative_weight, 0)
        require_number("kl_coef", self.kl_coef, 0)
        require_number("entropy_coef", self.entropy_coef)
        if self.entropy_top_p is not None:
            require_number("entropy_top_p", self.entropy_top_p, 0, 1)
            require(0 < self.entropy_top_p < 1, "entropy_top_p", "a number in (0, 1)", self.entropy_top_p)
        if self.dual_clip is not None:
            require_number("dual_clip", self.dual_clip, 1)
            require(self.dual_clip > 1, "dual_clip", "a finite number > 1", self.dual_clip)
        if self.importance_cap is not None:
            require_number("importance_cap", self.importance_cap, 0)
            require(self.importance_cap > 0, "importance_cap", "a finite number > 0", self.importance_cap)
        if self.fixed_length is not None:
            ok = is_number(self.fixed_length) and isinstance(self.fixed_length, int) and self.fixed_length > 0
            require(ok, "fixed_length", "a positive int", repr(self.fixed_length))

    @property
    def clip(self) -> Clip:
        """The ratio's bounds."""
        return Clip(self.clip_low, self.clip_high, self.dual_clip)

    @property
    def scope(self) -> str:
        """What a token's coefficient depends on: "token", "sequence" or "batch" (a function)."""
        if callable(self.surrogate):
            return "batch"
        return "sequence" if self.surrogate in SEQUENCE_RATIO else "token"


def _choice_or_function(name: str, value: object, table: Iterable[str]) -> None:
    if not callable(value):
        ok = isinstance(value, str) and value in list(table)
        require(ok, name, f"one of {', '.join(table)} or a function", repr(value))
