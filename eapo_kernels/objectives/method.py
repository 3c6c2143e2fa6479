"""What a method is: a policy loss as data, what weighs its tokens, and what steers it from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import may_read, require_scalar
from ..errors import EapoError, require
from .config import EAPOConfig
from .controllers import Controller, EntropyRatio, build_controller
from .shaping.token_weighting import TokenWeighting


@dataclass(frozen=True)
class Method:
    """A policy-gradient method. A user's own is just another object.

    Attributes:
        name: what ``METHODS`` calls it.
        config: surrogate, advantage, split, reduction and coefficients.
        positive_weight: factor on the positive responses; None: the caller gives it at every call.
        controller: name of what steers it from step to step, in ``CONTROLLERS``, or None.
        controller_settings: the controller's numbers where they are not its own defaults.
        token_weighting: weighs every token once a step (``weight_tokens``), or None.
        source: arXiv id of the paper, and of what else the numbers are from.
        summary: one sentence.
        formula: the weights in a line, in the symbols of docs/math.md.
        confidence: "high" (read in the authors' code), "medium" (from a description), "low" (our proposal under the paper's
            name).
    """

    name: str
    config: EAPOConfig
    positive_weight: float | None = 1.0
    controller: str | None = None
    controller_settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    token_weighting: TokenWeighting | None = None
    source: str = ""
    summary: str = ""
    formula: str = ""
    confidence: str = "high"

    @property
    def scope(self) -> str:
        """What a token's weight is computed from: "token", "sequence", "group" or "batch".

        The weights of a token_weighting are fixed before the loss, so whatever their scope, the loss itself may be of token scope
        (``config.scope``) and take the one-pass schedule.
        """
        return self.config.scope if self.token_weighting is None else self.token_weighting.scope


def make_controller(method: Method) -> Controller | None:
    """A fresh controller with the method's settings; None for a method without one.

    Raises:
        EapoError: the controller or a setting is unknown, or a number is out of its range.
    """
    return None if method.controller is None else build_controller(method.controller, method.controller_settings)


def resolve_positive_weight(
    method: Method, given: float | Tensor | EntropyRatio | None, device: torch.device, debug: bool
) -> Tensor:
    """The weight of the positives as a 0-dim fp32 tensor on the device: the method's own, or else the caller's.

    Raises EapoError when both or neither are given, or when it is not a finite number >= 0 (tensors: see ``may_read``).
    """
    if method.positive_weight is not None:
        if given is not None:
            own = f"whose weight is {method.positive_weight:g}"
            raise EapoError(f"positive_weight: expected None for method {method.name!r}, {own}, got {given!r}")
        given = method.positive_weight
    elif given is None:
        raise EapoError(
            f"positive_weight: expected a number, a 0-dim tensor or an EntropyRatio for method {method.name!r}, got None"
        )
    value = given.weight if isinstance(given, EntropyRatio) else given
    require_scalar("positive_weight", value, "a number, a 0-dim tensor or an EntropyRatio")
    if not isinstance(value, Tensor):
        require(0 <= value < math.inf, "positive_weight", "a finite number >= 0", value)
        return torch.full((), value, dtype=torch.float32, device=device)
    if may_read(value, debug):
        require(bool((value >= 0) & value.isfinite()), "positive_weight", "a finite number >= 0", float(value))
    if value.device.type == "cpu" and device.type != "cpu":  # a fill, not a copy that would block and cannot be captured
        return torch.full((), float(value), dtype=torch.float32, device=device)
    return value.detach().to(device, torch.float32, copy=True)
