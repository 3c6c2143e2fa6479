"""Controllers: numbers updated once a step from the policy's entropy, saved in checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import LARGEST, EapoError, is_number, require, require_choice, require_number, require_scalar


class Controller:
    """Base of the controllers: checked settings, named state, and ``_next``.

    The state is a set of 0-dim fp64 tensors on the device of the sum that ``update`` is given, so
    ``update`` does not synchronize with an accelerator.

    Class attributes:
        output: the state that ``update`` returns.
        positive: whether an entropy of zero is refused.
        state_rule: what ``load_state_dict`` expects of the state, in words.
    """

    output: ClassVar[str]
    positive: ClassVar[bool] = False
    state_rule: ClassVar[str] = "finite numbers, and entropies >= 0"

    def __init__(self, settings: Mapping[str, float], state: Mapping[str, float]) -> None:
        self._settings = dict(settings)
        self._state = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
        self._measured = {name for name, value in state.items() if math.isnan(value)}  # entropies; NaN before the first

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a step with this mean entropy (nats, 0-dim fp64)."""
        raise NotImplementedError

    def update(self, entropy_sum: float | Tensor, token_count: float | Tensor) -> Tensor:
        """Advance the state by one step.

        The entropy is a sum and a count, so that micro-batches and ranks can be added up first.

        Args:
            entropy_sum: sum of the entropies of all tokens of the step (nats), number or 0-dim
                tensor.
            token_count: their number.

        Returns:
            0-dim fp64, the state named by ``output``.

        Raises:
            EapoError: the entropy is not a finite number >= 0 (> 0 where the controller divides by
                it), or the count is not positive. Values on an accelerator are not read: there such
                a step leaves the state as it was.
        """
        require_scalar("entropy_sum", entropy_sum, "a number or a 0-dim tensor")
        require_scalar("token_count", token_count, "a number or a 0-dim tensor")
        total = torch.as_tensor(entropy_sum, dtype=torch.float64).detach()
        count = torch.as_tensor(token_count, dtype=torch.float64).detach().to(total.device)
        if total.device.type == "cpu":
            require(bool((count > 0) & count.isfinite()), "token_count", "a positive number", float(count))
            expected = "a positive finite number of nats" if self.positive else "a finite number of nats >= 0"
            mean = total / count
            require(bool(mean.isfinite() & self._in_range(mean)), "entropy_sum", expected, float(total))
        self._advance(total / count)
        return self._state[self.output]

    def _in_range(self, entropy: Tensor) -> Tensor:
        return entropy > 0 if self.positive else entropy >= 0

    def _advance(self, entropy: Tensor) -> None:
        """The next state, or the same where the entropy is out of range."""
        good = entropy.isfinite() & self._in_range(entropy)
        before = {name: value.to(entropy.device) for name, value in self._state.items()}
        after = self._next(entropy, before)
        self._state = {name: torch.where(good, after[name], before[name]) for name in before}

    def values(self) -> dict[str, Tensor]:
        """The state by name, 0-dim fp64: what ``weight_tokens`` takes as ``state``."""
        return dict(self._state)

    def metrics(self) -> dict[str, Tensor]:
        """What to log."""
        return {f"controller/{name}": value for name, value in self.values().items()}

    def state_dict(self) -> dict[str, Any]:
        """State and settings; tensors on the CPU."""
        return {name: value.cpu().clone() for name, value in self._state.items()} | {"settings": dict(self._settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state_dict()``.

        Raises:
            EapoError: keys are missing or unknown, or the state was written with other settings.
        """
        own, expected = type(self).__name__, {*self._state, "settings"}
        require(isinstance(state, Mapping), f"{own} state", "what state_dict() returned", repr(state))
        require(set(state) == expected, f"{own} state", f"keys {sorted(expected)}", sorted(state))
        if state["settings"] != self._settings:
            raise EapoError(f"{own} settings: expected {self._settings}, got {state['settings']}")
        for name in self._state:
            require_scalar(f"{own} {name}", state[name], "a number or a 0-dim tensor")
        values = {name: torch.as_tensor(state[name], dtype=torch.float64).clone() for name in self._state}
        known = all(v >= 0 or v.isnan() if name in self._measured else True for name, v in values.items())
        finite = all(v.isfinite() or (name in self._measured and v.isnan()) for name, v in values.items())
        good = known and finite and bool(values.get("steps", torch.zeros(())) >= 0) and self._is_good(values)
        require(good, f"{own} state", self.state_rule, {k: state[k] for k in sorted(expected)})
        self._state = values

    def _is_good(self, state: Mapping[str, Tensor]) -> bool:
        """Whether training can resume from this state."""
        return True


class EntropyRatio(Controller):
    """The EAPO weight of the positives: current over initial policy entropy (E9; arXiv 2605.27846).

        weight_k = clamp(scale * (H_k / H_0) ** kappa, low, high)

    H_k is the token-mean entropy of the policy on this step's rollouts; H_0 is that of the first
    update, or the mean of the first ``anchor_steps``, during which the weight stays at its initial value.
    With several micro-batches or ranks, add up the sums and the counts first (all-reduce both).
    When the policy's entropy falls, positives count less; when it rises, they count more.
    """

    output: ClassVar[str] = "weight"
    positive: ClassVar[bool] = True
    state_rule: ClassVar[str] = "finite numbers, entropies and a weight >= 0"

    def __init__(
        self, kappa: float = 1.0, scale: float = 1.0, low: float = 0.0, high: float = math.inf, ema: float = 0.0,
        anchor_steps: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            kappa: exponent of the ratio; 0 makes the weight constant.
            scale: lambda_0, the weight at the first step.
            low: lower bound of the weight, >= 0.
            high: upper bound of the weight.
            ema: share of the previous entropy in an exponential moving average, in [0, 1). 0: each
                step uses its own entropy. It starts from H_0 after the anchor steps.
            anchor_steps: number of first steps whose mean entropy is H_0. With P questions a step
                H_0 has a noise of sigma / sqrt(P * anchor_steps), sigma the deviation between
                questions, that no later step removes.

        Raises:
            EapoError: a number out of its range.
        """
        settings = {"kappa": kappa, "scale": scale, "low": low, "high": high, "ema": ema, "anchor_steps": anchor_steps}
        for name, value in settings.items():
            require(is_number(value), name, "a number", repr(value))
        require_number("kappa", kappa)
        require_number("scale", scale, 0)
        require(0 <= low <= high and low <= LARGEST, "low, high", "0 <= low <= high, low finite", f"low={low}, high={high}")
        require(0 <= ema < 1, "ema", "a number in [0, 1)", ema)
        require(anchor_steps >= 1 and anchor_steps % 1 == 0, "anchor_steps", "a whole number >= 1", anchor_steps)
        super().__init__(
            {name: float(value) for name, value in settings.items()},
            {"initial_entropy": math.nan, "entropy": math.nan, "weight": min(max(scale, low), high), "steps": 0.0},
        )
        self.anchor_steps = int(anchor_steps)
        self.kappa, self.scale, self.ema = float(kappa), float(scale), float(ema)
        self.low, self.high = float(low), float(high)

    @property
    def initial_entropy(self) -> Tensor:
        """H_0 (nats), 0-dim; during the anchor steps their mean so far; NaN before the first update."""
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
        """The weight of the positives, 0-dim; ``clamp(scale, low, high)`` at first."""
        return self._state["weight"]

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        previous, initial, steps = state["entropy"], state["initial_entropy"], state["steps"] + 1
        anchoring = steps <= self.anchor_steps
        mean = torch.where(initial.isnan(), entropy, initial + (entropy - initial) / steps)
        initial = torch.where(anchoring, mean, initial)
        smoothed = torch.where(anchoring, mean, self.ema * previous + (1 - self.ema) * entropy)
        power = ((smoothed / initial) ** self.kappa).clamp_max(LARGEST)
        weight = (self.scale * power).clamp(self.low, min(self.high, LARGEST))
        return {"initial_entropy": initial, "entropy": smoothed, "weight": weight, "steps": steps}

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


class ProportionalIntegral(Controller):
    """alpha_k = kp e_k + ki sum_{j<k} e_j, e = H - target: a set point for H (EntroPIC).

    State: alpha (0 before the first update), integral.
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
    """The mean entropy of all steps so far, the present one included; each step counts the same.

    State: history (nats; NaN before the first update), steps. Source: EPO, arXiv 2509.22576.
    """

    output: ClassVar[str] = "history"

    def __init__(self) -> None:
        super().__init__({}, {"history": math.nan, "steps": 0.0})

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        steps = state["steps"] + 1
        before = torch.where(state["history"].isnan(), entropy, state["history"])
        return {"history": before + (entropy - before) / steps, "steps": steps}


class Anchor(Controller):
    """The first step's entropy (SIREN, arXiv 2509.25133). Update it with ``observed_entropy``.

    State: anchor (nats; NaN before the first update).
    """

    output: ClassVar[str] = "anchor"

    def __init__(self, anchor: float | None = None) -> None:
        """anchor: nats, in place of the first step's entropy."""
        if anchor is not None:
            require_number("anchor", anchor, 0)
        super().__init__({} if anchor is None else {"anchor": anchor}, {"anchor": math.nan if anchor is None else anchor})

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"anchor": torch.where(state["anchor"].isnan(), entropy, state["anchor"])}


class EntropyTrend(Controller):
    """trend_k = H_k / Hbar_{k-1} - 1, Hbar a moving average; needs H > 0.

    Negative while the entropy falls. State: trend (0 up to the first update), average (nats).
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
    """A sampling temperature: high where H is at or below the target, else low.

    Source: AEPO, arXiv 2510.08141. State: temperature (the high one before the first update, as
    released), target (nats), above (1 where H > target, else 0).
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


class Doubling(Controller):
    """A factor that doubles while the entropy is too low and halves while it is too high (REPO-R, arXiv 2603.11682).

        H < H*: zeta doubled if positive, halved if negative;  H > H*: the opposite;  low <= |zeta| <= high

    A factor that should be halved at |zeta| = low changes its sign. The order of these rules at the bound is ours.
    State: zeta, target (nats; NaN before the first update, if it is the first step's entropy).
    """

    output: ClassVar[str] = "zeta"
    state_rule: ClassVar[str] = "0-dim numbers, low <= |zeta| <= high"

    def __init__(self, zeta: float = 1e-3, low: float = 1e-4, high: float = 0.05, target: float | None = None) -> None:
        """zeta: at first. low, high: bounds of its magnitude (the paper's). target: nats, in place of the first step's H."""
        settings = {"high": high, "low": low, "zeta": zeta} | ({} if target is None else {"target": target})
        for name, value in settings.items():
            require_number(name, value, -math.inf if name == "zeta" else 0)
        ok = 0 < low <= abs(zeta) <= high
        require(ok, "low, zeta, high", "0 < low <= |zeta| <= high", f"low={low}, zeta={zeta}, high={high}")
        super().__init__(settings, {"zeta": zeta, "target": math.nan if target is None else target})
        self.low, self.high = low, high

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        zeta, target = state["zeta"], torch.where(state["target"].isnan(), entropy, state["target"])
        grows = (zeta > 0) == (entropy < target)
        size = torch.where(grows, 2 * zeta.abs(), 0.5 * zeta.abs()).clamp(self.low, self.high)
        turned = torch.where(~grows & (zeta.abs() <= self.low), -zeta, size * zeta.sign())
        return {"zeta": torch.where(entropy == target, zeta, turned), "target": target}

    def _is_good(self, state: Mapping[str, Tensor]) -> bool:
        return bool((state["zeta"].abs() >= self.low) & (state["zeta"].abs() <= self.high))


CONTROLLERS: MappingProxyType[str, Callable[..., Controller]] = MappingProxyType(
    {
        "entropy_ratio": EntropyRatio,
        "proportional_integral": ProportionalIntegral,
        "entropy_history": EntropyHistory,
        "anchor": Anchor,
        "entropy_trend": EntropyTrend,
        "target_switch": TargetSwitch,
        "doubling": Doubling,
    }
)


def controller_defaults(name: str) -> dict[str, Any]:
    """A controller's settings by name, with their defaults."""
    require_choice("controller", name, CONTROLLERS)
    return {p.name: p.default for p in inspect.signature(CONTROLLERS[name]).parameters.values()}


def controller_fields(name: str) -> tuple[str, ...]:
    """The names of a controller's settings."""
    return tuple(controller_defaults(name))


def build_controller(name: str, settings: Mapping[str, float]) -> Controller:
    """A fresh controller by name.

    Raises:
        EapoError: the name or a setting is unknown, or a number is out of its range.
    """
    known = controller_fields(name)
    unknown = sorted(set(settings) - set(known))
    require(not unknown, "controller_settings", f"names among {', '.join(known)}", ", ".join(unknown))
    return CONTROLLERS[name](**settings)
