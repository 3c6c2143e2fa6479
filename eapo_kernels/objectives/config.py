"""The settings of a policy loss, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import is_number, require, require_choice, require_number
from .advantages import ADVANTAGES, SPLITS, Advantage
from .reductions import REDUCTIONS
from .surrogates import KL_ESTIMATORS, SEQUENCE_RATIO, SURROGATES, Clip, Surrogate


@dataclass(frozen=True)
class EAPOConfig:
    """A policy loss without the positive weight (docs/math.md E9, E10).

    Attributes:
        clip_low: the ratio's lower bound is 1 - clip_low, in [0, 1].
        clip_high: the ratio's upper bound is 1 + clip_high.
        dual_clip: c > 1 bounds the loss of a token with a negative advantage by c * |A|
            (surrogates with a clipped ratio), or None.
        surrogate: "reinforce", "ppo_clip", "unclipped", "balanced_clip", "cispo", "hapo" (reads
            ``entropy_score``), "gspo" (ratio of the sequence), or a function with the signature ``surrogates.Surrogate``.
        advantage: "group_norm", "group_mean", "sign", "batch_norm", "binary", or a function with
            the signature ``advantages.Advantage``.
        split: which responses are positive: those with a reward above the mean of their "group" or
            of the "batch", or with an "advantage" above 0.
        reduction: "token_mean", "seq_mean_token_mean", "seq_mean_token_sum" or "fixed_length".
        fixed_length: constant number of tokens for reduction "fixed_length".
        negative_weight: factor on the responses that are not positive.
        drop_zero_weight: mask responses of weight zero; the denominators do not count them either.
        kl_coef: factor of the KL penalty to ``ref_logp`` (loss per nat).
        kl_estimator: "k1", "k2" or "k3".
        entropy_coef: factor of the entropy bonus (loss per nat).
        entropy_top_p: in (0, 1): the bonus is on the entropy of the renormalised nucleus of this
            mass (autograd schedule only); None: on the entropy of the whole distribution.
        importance_cap: upper bound of exp(old_logp - rollout_logp), a factor on the policy term
            that corrects for a rollout engine whose log-probs differ; None: no correction.
        scope: whose statistics a token's coefficient depends on: "token", "sequence" or "batch".
            Computed from ``surrogate``; no argument.
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
    scope: ClassVar[str]  # not a field; each object has its own value

    def __post_init__(self) -> None:
        for name, table in (("surrogate", SURROGATES), ("advantage", ADVANTAGES)):
            value = getattr(self, name)
            known = callable(value) or (isinstance(value, str) and value in table)
            require(known, name, f"one of {', '.join(table)} or a function", repr(value))
        require_choice("split", self.split, SPLITS)
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require(isinstance(self.drop_zero_weight, bool), "drop_zero_weight", "True or False", repr(self.drop_zero_weight))
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
            ok = is_number(self.fixed_length) and isinstance(self.fixed_length, int) and 0 < self.fixed_length < 2**31
            require(ok, "fixed_length", "a positive int", repr(self.fixed_length))
        scope = "batch" if callable(self.surrogate) else "sequence" if self.surrogate in SEQUENCE_RATIO else "token"
        object.__setattr__(self, "scope", scope)

    @property
    def clip(self) -> Clip:
        """The ratio's bounds."""
        return Clip(self.clip_low, self.clip_high, self.dual_clip)
