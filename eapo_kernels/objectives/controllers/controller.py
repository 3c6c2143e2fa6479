"""What every controller is: a few numbers, updated once a step from the policy's entropy, that live in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import require_scalar
from ...errors import EapoError, require


class Controller:
    """Base of the controllers. A subclass checks its settings, names its state and writes ``_next``.

    The state stays 0-dim fp64 tensors on the device of the sum that ``update`` is given: nothing synchronises.

    Class attributes:
        output: the state that ``update`` returns.
        positive: whether an entropy of zero is refused.
        state_rule: what ``load_state_dict`` expects of the state, in words.
    """

    output: ClassVar[str]
    positive: ClassVar[bool] = False
    state_rule: ClassVar[str] = "0-dim numbers"

    def __init__(self, settings: Mapping[str, float], state: Mapping[str, float]) -> None:
        self._settings = dict(settings)
        self._state = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}

    def _next(self, entropy: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a step with this mean entropy (nats, 0-dim fp64)."""
        raise NotImplementedError

    def update(self, entropy_sum: float | Tensor, token_count: float | Tensor) -> Tensor:
        """Take in one step's entropy, as a sum and a count so that micro-batches and ranks can be added up before.

        Args:
            entropy_sum: sum of the entropies of all tokens of the step (nats), number or 0-dim tensor.
            token_count: their number.

        Returns:
            0-dim fp64, the number ``output`` names.

        Raises:
            EapoError: the entropy is not a finite number >= 0 (> 0 where the controller divides by it), or the count not
                positive. Tensors on an accelerator are not looked at: there such a step leaves the state as it was.
        """
        require_scalar("entropy_sum", entropy_sum, "a number or a 0-dim tensor")
        require_scalar("token_count", token_count, "a number or a 0-dim tensor")
        total = torch.as_tensor(entropy_sum, dtype=torch.float64).detach()
        count = torch.as_tensor(token_count, dtype=torch.float64).detach().to(total.device)
        if total.device.type == "cpu":
            require(bool(count > 0), "token_count", "a positive number", float(count))
            expected = "a positive finite number of nats" if self.positive else "a finite number of nats >= 0"
            require(bool(total.isfinite() & self._in_range(total)), "entropy_sum", expected, float(total))
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
        """What token weightings read as ``state``: 0-dim fp64 tensors by name."""
        return dict(self._state)

    def metrics(self) -> dict[str, Tensor]:
        """What to log."""
        return {f"controller/{name}": value for name, value in self.values().items()}

    def state_dict(self) -> dict[str, Any]:
        """State and settings; tensors on the CPU."""
        return {name: value.cpu().clone() for name, value in self._state.items()} | {"settings": dict(self._settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            EapoError: keys are missing or unknown, or the state was written with other settings.
        """
        own, expected = type(self).__name__, {*self._state, "settings"}
        require(set(state) == expected, f"{own} state", f"keys {sorted(expected)}", sorted(state))
        if state["settings"] != self._settings:
            raise EapoError(f"{own} settings: expected {self._settings}, got {state['settings']}")
        values = {name: torch.as_tensor(state[name], dtype=torch.float64).clone() for name in self._state}
        good = all(v.dim() == 0 for v in values.values()) and self._is_good(values)
        require(good, f"{own} state", self.state_rule, {k: state[k] for k in sorted(expected)})
        self._state = values

    def _is_good(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state from a checkpoint can be gone on from."""
        return True
