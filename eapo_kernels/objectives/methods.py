"""Methods as data: a policy loss is a configuration and what weighs its positives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import require
from .config import EAPOConfig
from .shaping.covariance import ClipCov, KlCov
from .shaping.shaper import Shaper
from .shaping.steer import Steer


@dataclass(frozen=True)
class Method:
    """A policy-gradient method. A user's own is just another object.

    Attributes:
        name: what ``METHODS`` calls it.
        config: surrogate, advantage, split, reduction and coefficients.
        positive_weight: factor on the positive responses; None: the caller gives it at every call.
        controller: what computes that weight from step to step ("entropy_ratio"), or None.
        shaper: weighs every token once a step (``shape_batch``), or None.
        source: arXiv id of the paper.
        summary: one sentence.
        formula: the weights in a line, in the symbols of docs/math.md.
        confidence: "high" (read in the authors' code), "medium" (from a description), "low" (our proposal under the paper's
            name; the method's name ends in ``_like``).
    """

    name: str
    config: EAPOConfig
    positive_weight: float | None = 1.0
    controller: str | None = None
    shaper: Shaper | None = None
    source: str = ""
    summary: str = ""
    formula: str = ""
    confidence: str = "high"

    @property
    def scope(self) -> str:
        """What a token's weight is computed from: "token", "sequence", "group" or "batch".

        The weights of a shaper are fixed before the loss, so whatever their scope, the loss itself may be of token scope
        (``config.scope``) and take the one-pass schedule.
        """
        return self.config.scope if self.shaper is None else self.shaper.scope


_BINARY = EAPOConfig(advantage="binary", split="advantage")

METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {
        m.name: m
        for m in (
            Method(
                "eapo",
                EAPOConfig(),
                positive_weight=None,
                controller="entropy_ratio",
                source="2605.27846",
                summary="Positives (reward above the group mean) weighted by current over initial policy entropy.",
            ),
            Method(
                "grpo",
                EAPOConfig(reduction="seq_mean_token_mean"),
                source="2402.03300",
                summary="Group-normalised advantages, clipped ratio, every response counts the same.",
            ),
            Method(
                "dr_grpo",
                EAPOConfig(advantage="group_mean", reduction="fixed_length"),
                source="2503.20783",
                summary="No division by the group's spread, constant length (set fixed_length): no difficulty or length bias.",
            ),
            Method(
                "psr",
                replace(_BINARY, negative_weight=0.0, drop_zero_weight=True),
                source="2506.01347",
                summary="Positive sample reinforcement: only correct responses (reward 1), advantage +1.",
            ),
            Method(
                "nsr",
                replace(_BINARY, drop_zero_weight=True),
                positive_weight=0.0,
                source="2506.01347",
                summary="Negative sample reinforcement: only wrong responses (reward 0), advantage -1.",
            ),
            Method(
                "w_reinforce",
                _BINARY,
                positive_weight=0.1,
                source="2506.01347",
                summary="Weighted REINFORCE: correct responses +0.1, wrong ones -1.",
            ),
            Method(
                "clip_cov",
                EAPOConfig(clip_low=1.0, clip_high=1.0),
                shaper=ClipCov(),
                source="2505.22617",
                summary="A few of the tokens with a high covariance of advantage and log-prob lose their gradient.",
                formula="w_t = 0 on a random 2e-4 of the tokens with 1 < (A_t - mean A)(log p_t - mean log p) < 5",
            ),
            Method(
                "kl_cov",
                EAPOConfig(surrogate="unclipped"),
                shaper=KlCov(),
                source="2505.22617",
                summary="The tokens with the highest covariance of advantage and log-prob pay for leaving the old policy.",
                formula="+ beta |log rho_t| on the 0.2 % of the tokens with the largest covariance",
            ),
            Method(
                "steer",
                EAPOConfig(clip_high=0.28, dual_clip=10.0),
                shaper=Steer(),
                source="2510.10150",
                summary="Tokens that are predicted to change the entropy much count less.",
                formula="w_t = exp(ln(lambda_min) |Omega_t| / max |Omega|), Omega_t = A_t p_t (1 - p_t)(log p_t + H_t)",
            ),
        )
    }
)


def get_method(method: str | Method, **changes: Any) -> Method:
    """A method by name or itself, with fields of its config (or ``positive_weight``) changed.

    Raises:
        EapoError: the name or a field is unknown, or a value is out of range.
    """
    if isinstance(method, str):
        require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
        method = METHODS[method]
    require(isinstance(method, Method), "method", "a name or a Method", repr(method))
    if "positive_weight" in changes:
        method = replace(method, positive_weight=changes.pop("positive_weight"))
    if method.shaper is not None:
        own = {name: changes.pop(name) for name in list(changes) if name in method.shaper.__dataclass_fields__}
        method = replace(method, shaper=replace(method.shaper, **own)) if own else method
    known = [*EAPOConfig.__dataclass_fields__, *(method.shaper.__dataclass_fields__ if method.shaper else ())]
    unknown = sorted(set(changes) - set(known))
    require(not unknown, "config", f"fields among {', '.join(known)}", ", ".join(unknown))
    return replace(method, config=replace(method.config, **changes)) if changes else method
