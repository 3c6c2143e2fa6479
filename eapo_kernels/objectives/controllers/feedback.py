"""Controllers of the other methods: a set point, a history, an anchor, a trend, a switch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from ...errors import require
from .controller import Controller


class ProportionalIntegral(Controller):
    """alpha_k = kp e_k + ki sum_{j<k} e_j, e = H - target: the entropy is held at a set point (EntroPIC).

    values: alpha (0 before the first update), integral.
    """

    output: ClassVar[str] = "alpha"

    def __init__(self, target: float = 0.5, kp: float = 1.0, ki: float = 0.01) -> None:
        """target: nats. kp, ki: factors per nat."""
        settings = {"target": target, "kp": kp, "ki": ki}
        for name, value in settings.items():
            require_number(name, value, 0)
        super().__init__(settings, {"alpha": 0.0, "integral": 0.0})
        self.target, self.kp, self.ki = target, kp, ki

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        error = entropy - self.target
        return {"alpha": self.kp * error + state["integral"], "integral": state["integral"] + self.ki * error}


class EntropyHistory(Controller):
    """The mean entropy of all steps so far, the present one included, each step counting the same (EPO, arXiv 2509.22576).

    values: history (nats; NaN before the first update), steps.
    """

    output: ClassVar[str] = "history"

    def __init__(self) -> None:
        super().__init__({}, {"history": math.nan, "steps": 0.0})

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        steps = state["steps"] + 1
        before = torch.where(state["history"].isnan(), entropy, state["history"])
        return {"history": before + (entropy - before) / steps, "steps": steps}


class Anchor(Controller):
    """The first step's entropy, kept (SIREN, arXiv 2509.25133). Give it what ``observed_entropy`` returns.

    values: anchor (nats; NaN before the first update).
    """

    output: ClassVar[str] = "anchor"

    def __init__(self, anchor: float | None = None) -> None:
        """anchor: nats, instead of the first step's own."""
        if anchor is not None:
            require_number("anchor", anchor, 0)
        super().__init__({} if anchor is None else {"anchor": anchor}, {"anchor": math.nan if anchor is None else anchor})

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"anchor": torch.where(state["anchor"].isnan(), entropy, state["anchor"])}


class EntropyTrend(Controller):
    """trend_k = H_k / Hbar_{k-1} - 1, Hbar a moving average: below zero where entropy is falling. Positive entropies.

    values: trend (0 up to the first update), average (nats).
    """

    output: ClassVar[str] = "trend"
    positive: ClassVar[bool] = True

    def __init__(self, memory: float = 0.9) -> None:
        """memory: share of the past in the average, in [0, 1)."""
        require_number("memory", memory, 0)
        require(memory < 1, "memory", "a number in [0, 1)", memory)
        super().__init__({"memory": memory}, {"trend": 0.0, "average": math.nan})
        self.memory = memory

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before = torch.where(state["average"].isnan(), entropy, state["average"])
        return {"trend": entropy / before - 1, "average": self.memory * before + (1 - self.memory) * entropy}


class TargetSwitch(Controller):
    """The temperature of the samples that steer: high where H is at or below the target, else low (AEPO, arXiv 2510.08141).

    values: temperature (the high one before the first update, as released), target (nats), above (1 where H > target, else 0).
    """

    output: ClassVar[str] = "temperature"

    def __init__(self, target: float = 0.5, low: float = 0.8, high: float = 1.2) -> None:
        """target: nats. low, high: temperatures."""
        settings = {"target": target, "low": low, "high": high}
        for name, value in settings.items():
            require_number(name, value, 0)
        require(0 < low <= high, "low, high", "0 < low <= high", f"low={low}, high={high}")
        super().__init__(settings, {"temperature": high, "target": target, "above": 0.0})
        self.target, self.low, self.high = target, low, high

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        above = (entropy > self.target).double()
        temperature = torch.where(entropy > self.target, self.low, self.high).double()
        return {"temperature": temperature, "target": state["target"], "above": above}
