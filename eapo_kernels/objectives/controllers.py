"""Numbers that are steered from step to step. They live in the checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import is_number, require_scalar
from ..errors import EapoError, require


class EntropyRatio:
    """The EAPO weight of the positives: current over initial policy entropy (docs/math.md E9; arXiv 2605.27846).

        weight_k = clamp(scale * (H_k / H_0) ** kappa, low, high)

    H_k is the token-mean entropy of the policy on this step's rollouts, handed in as a sum and a count so that micro-batches
    and ranks can be added up (all-reduce both) before the one division. The first update sets H_0.
    The policy's entropy falls: positives count less and exploration is kept; it rises: positives count more.

    Everything stays a 0-dim fp64 tensor on the device of the given sum: ``update`` does not synchronise.
    """

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
        for name, value in (("kappa", kappa), ("scale", scale), ("low", low), ("high", high), ("ema", ema)):
            require(is_number(value), name, "a number", repr(value))
        require(math.isfinite(kappa), "kappa", "a finite number", kappa)
        require(math.isfinite(scale) and scale >= 0, "scale", "a finite number >= 0", scale)
        require(0 <= low <= high and low < math.inf, "low, high", "0 <= low <= high, low finite", f"low={low}, high={high}")
        require(0 <= ema < 1, "ema", "a number in [0, 1)", ema)
        self.kappa, self.scale, self.ema = float(kappa), float(scale), float(ema)
        self.low, self.high = float(low), float(high)
        self._initial = torch.tensor(math.nan, dtype=torch.float64)
        self._entropy = torch.tensor(math.nan, dtype=torch.float64)
        self._weight = torch.tensor(min(max(scale, low), high), dtype=torch.float64)

    @property
    def initial_entropy(self) -> Tensor:
        """H_0 (nats), 0-dim; NaN before the first update."""
        return self._initial

    @property
    def entropy(self) -> Tensor:
        """H_k (nats), smoothed by ``ema``; NaN before the first update."""
        return self._entropy

    @property
    def ratio(self) -> Tensor:
        """H_k / H_0; NaN before the first update."""
        return self._entropy / self._initial

    @property
    def weight(self) -> Tensor:
        """The weight of the positives, 0-dim; ``clamp(scale, low, high)`` before the first update."""
        return self._weight

    def update(self, entropy_sum: float | Tensor, token_count: float | Tensor) -> Tensor:
        """Take in one step's entropy and return the new weight.

        Args:
            entropy_sum: sum of the entropies of all tokens of the step (nats), number or 0-dim tensor.
            token_count: their number.

        Raises:
            EapoError: the entropy is not a positive finite number, or the count not positive. Tensors on an accelerator are
                not looked at: there such a step leaves the state as it was.
        """
        require_scalar("entropy_sum", entropy_sum, "a number or a 0-dim tensor")
        require_scalar("token_count", token_count, "a number or a 0-dim tensor")
        total = torch.as_tensor(entropy_sum).detach().double()
        count = torch.as_tensor(token_count).detach().to(total.device, torch.float64)
        if total.device.type == "cpu":
            require(bool(count > 0), "token_count", "a positive number", float(count))
            require(bool(total.isfinite() & (total > 0)), "entropy_sum", "a positive finite number of nats", float(total))
        entropy = total / count
        good = entropy.isfinite() & (entropy > 0)
        initial, previous, weight = (t.to(total.device) for t in (self._initial, self._entropy, self._weight))
        smoothed = torch.where(previous.isnan(), entropy, self.ema * previous + (1 - self.ema) * entropy)
        self._entropy = torch.where(good, smoothed, previous)
        self._initial = torch.where(good & initial.isnan(), entropy, initial)
        fresh = (self.scale * (self._entropy / self._initial) ** self.kappa).clamp(self.low, self.high)
        self._weight = torch.where(good, fresh, weight)
        return self._weight

    def metrics(self) -> dict[str, Tensor]:
        """What to log: entropy, initial entropy, their ratio and the weight."""
        return {
            "eapo/entropy": self.entropy,
            "eapo/entropy_init": self.initial_entropy,
            "eapo/entropy_ratio": self.ratio,
            "eapo/positive_weight": self.weight,
        }

    def state_dict(self) -> dict[str, Any]:
        """State and settings; tensors on the CPU."""
        state = {"initial_entropy": self._initial, "entropy": self._entropy, "weight": self._weight}
        return {k: t.cpu().clone() for k, t in state.items()} | {"settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            EapoError: keys are missing or unknown, or the state was written with other settings.
        """
        expected = {"initial_entropy", "entropy", "weight", "settings"}
        require(set(state) == expected, "EntropyRatio state", f"keys {sorted(expected)}", sorted(state))
        if state["settings"] != self._settings():
            raise EapoError(f"EntropyRatio settings: expected {self._settings()}, got {state['settings']}")
        values = [torch.as_tensor(state[k], dtype=torch.float64).clone() for k in ("initial_entropy", "entropy", "weight")]
        good = all(v.dim() == 0 for v in values) and bool((values[2] >= 0) & values[2].isfinite())
        require(good, "EntropyRatio state", "0-dim numbers and a finite weight >= 0", {k: state[k] for k in sorted(expected)})
        self._initial, self._entropy, self._weight = values

    def _settings(self) -> dict[str, float]:
        return {"kappa": self.kappa, "scale": self.scale, "low": self.low, "high": self.high, "ema": self.ema}
