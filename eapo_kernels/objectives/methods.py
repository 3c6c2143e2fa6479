"""Methods as data: a policy loss is a configuration and what weighs its positives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import require
from .config import EAPOConfig


@dataclass(frozen=True)
class Method:
    """A policy-gradient method. A user's own is just another object.

    Attributes:
        name: what ``METHODS`` calls it.
        config: surrogate, advantage, split, reduction and coefficients.
        positive_weight: factor on the positive responses; None: the caller gives it at every call.
        controller: what computes that weight from step to step ("entropy_ratio"), or None.
        source: arXiv id of the paper.
        summary: one sentence.
    """

    name: str
    config: EAPOConfig
    positive_weight: float | None = 1.0
    controller: str | None = None
    source: str = ""
    summary: str = ""

    @property
    def scope(self) -> str:
        """ "token" or "sequence": what one token's coefficient depends on."""
        return self.config.scope


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
    known = EAPOConfig.__dataclass_fields__
    unknown = sorted(set(changes) - set(known))
    require(not unknown, "config", f"fields among {', '.join(known)}", ", ".join(unknown))
    return replace(method, config=replace(method.config, **changes)) if changes else method
