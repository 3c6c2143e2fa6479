"""The EAPO weight for a trainer that keeps its own loss: measure the entropy and scale positive
advantages once a step.

The surrogates of PPO, GRPO, GSPO, CISPO, SAPO and VESPO are positively homogeneous in the
advantage: loss(w A) = w loss(A) for w >= 0. With A' = where(A > 0, w A, A) they give the exact EAPO
policy term (docs/math.md E10). Losses that select tokens by the advantage (clip_cov, kl_cov) are
not homogeneous, and the adapters refuse them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FLOATS, LARGEST, EapoError, ShapeError, describe, require, require_scalar
from ..objectives.controllers import EntropyRatio

STATE_FILE = "eapo_state.json"
"""Name of the controller's state inside a trainer's checkpoint folder."""


def scale_positive(advantages: Tensor, weight: float | Tensor) -> Tensor:
    """where(A > 0, weight * A, A), detached (docs/math.md E10). Every adapter applies the EAPO
    weight with it.

    Args:
        advantages: [...] float, after every normalisation. Padding may hold any value.
        weight: lambda >= 0, a number or 0-dim tensor, the same on all ranks and micro-batches of a
            step.

    Returns:
        [...] in the dtype and on the device of ``advantages``; bit-equal to it for weight 1.

    Raises:
        ShapeError: the advantages are not a floating-point tensor.
        EapoError: the weight is not a number >= 0 (the value of a tensor on an accelerator is not
            read).
    """
    if not (isinstance(advantages, Tensor) and advantages.dtype in FLOATS):
        raise ShapeError(f"advantages: expected a floating-point tensor, got {describe(advantages)}")
    require_scalar("weight", weight, "a number or 0-dim tensor >= 0")
    if not (isinstance(weight, Tensor) and weight.device.type != "cpu"):
        require(0 <= float(weight) <= LARGEST, "weight", "a finite number >= 0", float(weight))
    if isinstance(weight, Tensor):
        weight = weight.detach().to(advantages.device)
    advantages = advantages.detach()
    return torch.where(advantages > 0, advantages * weight, advantages)


class AdvantageWeight:
    """Entropy in, weight out, once a step: ``observe`` every micro-batch, ``step`` once, ``apply``
    to the step's advantages.

    It holds the controller. The controller's state, with the initial entropy H_0, belongs in every
    checkpoint (``save``, ``load``).
    """

    def __init__(self, controller: EntropyRatio | None = None) -> None:
        """
        Args:
            controller: what computes the weight; default ``EntropyRatio()``.
        """
        self.controller = EntropyRatio() if controller is None else controller
        require(isinstance(self.controller, EntropyRatio), "controller", "an EntropyRatio or None", controller)
        self._sums: Tensor | None = None

    def observe(self, entropy: Tensor, mask: Tensor) -> None:
        """Add a micro-batch of this rank. No gradient, no synchronisation.

        Args:
            entropy: [...] float, entropy of the temperature-scaled distribution at every token
                (nats).
            mask: [...] bool or 0/1, the tokens that count, as in the loss.

        Raises:
            ShapeError: shapes differ.
        """
        if not (isinstance(entropy, Tensor) and isinstance(mask, Tensor) and entropy.shape == mask.shape):
            raise ShapeError(f"mask: expected the shape of the entropies {describe(entropy)}, got {describe(mask)}")
        counted = torch.where(mask.bool(), entropy.detach().double(), 0.0)
        sums = torch.stack([counted.sum(), mask.bool().sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def observe_sampled(self, logp: Tensor, mask: Tensor) -> None:
        """``observe`` with -log p of the sampled tokens, for a trainer that does not expose the
        entropy.

        The mean over tokens sampled from the policy (same temperature, no top-p) is an unbiased
        estimate of the mean entropy. Log-probs that are not finite are masked.

        Args:
            logp: [...] float, log-prob of each sampled token under the policy that sampled it
                (nats).
            mask: [...] bool or 0/1, the tokens that count.
        """
        known = logp.isfinite()
        self.observe(torch.where(known, -logp, 0.0), mask.bool() & known)

    def step(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """All-reduce the observed sum and count in one collective, and update the controller.

        Every rank of the group must call it. A rank without tokens calls ``observe`` with empty
        tensors first. A step without any token leaves the weight unchanged.

        Args:
            group: the data-parallel ranks; None: all ranks. Without torch.distributed there is no
                collective.

        Returns:
            The step's weight, 0-dim fp64.

        Raises:
            EapoError: nothing was observed since the last step, or the entropy is not positive and
                finite (checked on a CPU only).
        """
        if self._sums is None:
            raise EapoError("step: expected observe() since the last step, got none")
        sums, self._sums = self._sums, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=group)
        if sums.device.type == "cpu" and not sums[1]:
            return self.weight
        return self.controller.update(sums[0], sums[1])

    @property
    def pending(self) -> bool:
        """Whether something was observed since the last step."""
        return self._sums is not None

    @property
    def weight(self) -> Tensor:
        """The weight of positive advantages, 0-dim fp64."""
        return self.controller.weight

    def apply(self, advantages: Tensor) -> Tensor:
        """``scale_positive`` with this step's weight. Call it once per tensor: a second call
        applies the weight twice."""
        return scale_positive(advantages, self.weight)

    def metrics(self) -> dict[str, Tensor]:
        """``eapo/entropy``, ``eapo/entropy_init``, ``eapo/entropy_ratio``,
        ``eapo/positive_weight``: 0-dim."""
        return self.controller.metrics()

    def save(self, directory: str | Path) -> Path:
        """Write the controller's state into a checkpoint folder, as JSON; returns the file."""
        state = self.controller.state_dict()
        plain = {name: float(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        path = Path(directory) / STATE_FILE
        path.write_text(json.dumps(plain, indent=1))
        return path

    def load(self, directory: str | Path) -> None:
        """Continue from ``save``.

        Raises:
            EapoError: the folder has no such state, or it was written with other settings.
        """
        path = Path(directory) / STATE_FILE
        require(path.is_file(), "checkpoint", f"{STATE_FILE} (H_0 of the run) in {directory}", "none")
        self.controller.load_state_dict(json.loads(path.read_text()))
