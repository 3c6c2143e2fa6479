"""The EAPO weight of the positives (docs/math.md E9)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import is_number
from ...errors import require
from .controller import Controller


class EntropyRatio(Controller):
    """The EAPO weight of the positives: current over initial policy entropy (docs/math.md E9; arXiv 2605.27846).

        weight_k = clamp(scale * (H_k / H_0) ** kappa, low, high)

    H_k is the token-mean entropy of the policy on this step's rollouts, handed in as a sum and a count so that micro-batches
    and ranks can be added up (all-reduce both) before the one division. The first update sets H_0.
    The policy's entropy falls: positives count less and exploration is kept; it rises: positives count more.

    Everything stays a 0-dim fp64 tensor on the device of the given sum: ``update`` does not synchronise.
    """

    output: ClassVar[str] = "weight"
    positive: ClassVar[bool] = True
    state_rule: ClassVar[str] = "0-dim numbers and a finite weight >= 0"

    def __init__(
        self, kappa: float = 1.0, scale: float = 1.0, low: float = 0.0, high: float = math.inf, ema: float = 0.0
    ) -> None:
        """
        Args:
            kappa: exponent of the ratio; 0 makes the weight constant.
            scale: lambda_0, the weight at the first step.
            low: lower bound of the weight, >= 0.
            high: upper bound of the weight.
            ema: share of the previous entropy in an exponential moving average, in [0, 1); 0 takes each step's own.

        Raises:
            EapoError: a number out of its range.
        """
        settings = {"kappa": kappa, "scale": scale, "low": low, "high": high, "ema": ema}
        for name, value in settings.items():
            require(is_number(value), name, "a number", repr(value))
        require(math.isfinite(kappa), "kappa", "a finite number", kappa)
        require(math.isfinite(scale) and scale >= 0, "scale", "a finite number >= 0", scale)
        require(0 <= low <= high and low < math.inf, "low, high", "0 <= low <= high, low finite", f"low={low}, high={high}")
        require(0 <= ema < 1, "ema", "a number in [0, 1)", ema)
        super().__init__(
            {name: float(value) for name, value in settings.items()},
            {"initial_entropy": math.nan, "entropy": math.nan, "weight": min(max(scale, low), high)},
        )
        self.kappa, self.scale, self.ema = float(kappa), float(scale), float(ema)
        self.low, self.high = float(low), float(high)

    @property
    def initial_entropy(self) -> Tensor:
        """H_0 (nats), 0-dim; NaN before the first update."""
        return self._state["initial_entropy"]

    @property
    def entropy(self) -> Tensor:
        """H_k (nats), smoothed by ``ema``; NaN before the first update."""
        return self._state["entropy"]

    @property
    def ratio(self) -> Tensor:
        """H_k / H_0; NaN before the first update."""
        return self.entropy / self.initial_entropy

    @property
    def weight(self) -> Tensor:
        """The weight of the positives, 0-dim; ``clamp(scale, low, high)`` before the first update."""
        return self._state["weight"]

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        previous, initial = state["entropy"], state["initial_entropy"]
        smoothed = torch.where(previous.isnan(), entropy, self.ema * previous + (1 - self.ema) * entropy)
        initial = torch.where(initial.isnan(), entropy, initial)
        weight = (self.scale * (smoothed / initial) ** self.kappa).clamp(self.low, self.high)
        return {"initial_entropy": initial, "entropy": smoothed, "weight": weight}

    def metrics(self) -> dict[str, Tensor]:
        """What to log: entropy, initial entropy, their ratio and the weight."""
        return {
            "eapo/entropy": self.entropy,
            "eapo/entropy_init": self.initial_entropy,
            "eapo/entropy_ratio": self.ratio,
            "eapo/positive_weight": self.weight,
        }

    def _is_good(self, state: Mapping[str, Tensor]) -> bool:
        return bool((state["weight"] >= 0) & state["weight"].isfinite())
