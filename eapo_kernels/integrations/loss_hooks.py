"""prime-rl and torchtitan's RL experiment: the weight inside their loss functions, one optimizer step late.

Both call a loss for every (micro-)batch and say nothing when a step begins. So entropies are added up as the loss sees them,
and an optimizer-step hook of PyTorch turns them into the weight of the *next* step, the same for all micro-batches and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import require
from .versions import require_hook
from .weight import STATE_FILE, AdvantageWeight


class StepWeight:
    """An ``AdvantageWeight`` that takes its step after every optimizer step of the process, on all ranks together.

    Every rank must have called the loss before its first optimizer step, and all ranks must step the same optimizers.
    """

    def __init__(self, weight: AdvantageWeight | None = None, *, directory: str | Path | None = None) -> None:
        """
        Args:
            weight: holds the controller.
            directory: where the state is kept: read now where there is one, written after every step. None: nowhere.
        """
        self.eapo = weight or AdvantageWeight()
        self.directory = None if directory is None else Path(directory)
        self._device: torch.device | None = None
        if self.directory is not None and (self.directory / STATE_FILE).is_file():
            self.eapo.load(self.directory)
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def weigh(self, advantages: Tensor, mask: Tensor, *, entropy: Tensor | None = None, logp: Tensor | None = None) -> Tensor:
        """Measure these tokens for the next step and weigh their advantages with this step's weight.

        Args:
            advantages: [...] float.
            mask: [...] bool, the tokens that count.
            entropy: [...] float (nats), or
            logp: [...] float, log-prob of the sampled tokens under the policy that sampled them, for an estimate.
        """
        require((entropy is None) != (logp is None), "entropy, logp", "one of them", "both or none")
        self._device = mask.device
        if entropy is not None:
            self.eapo.observe(entropy, mask)
        else:
            assert logp is not None
            self.eapo.observe_sampled(logp, mask)
        return self.eapo.apply(advantages)

    def _after_step(self, *_: Any) -> None:
        if self._device is None:
            return
        if not self.eapo.pending:  # a rank whose batch had no token takes part in the sum all the same
            nothing = torch.zeros(0, device=self._device)
            self.eapo.observe(nothing, nothing)
        self.eapo.step()
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.directory is not None and not (ranks and torch.distributed.get_rank()):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.eapo.save(self.directory)


_PRIME: dict[str, StepWeight] = {}


def prime_rl_loss(inputs: Any, *, base: str = "default", directory: str | None = None, **settings: Any) -> Any:
    """For prime-rl: ``[trainer.loss] type="custom", import_path="eapo_kernels.integrations.loss_hooks.prime_rl_loss"``.

    prime-rl's own loss on weighted advantages. The entropy is estimated from the inference engine's log-probs.

    Args:
        inputs: prime-rl's LossInputs of one sequence, tensors [s].
        base: "default" or "ipo", prime-rl's loss.
        directory: where the state is kept between runs, or None.
        settings: the fields of that loss's config (``[trainer.loss.kwargs]``).

    Returns:
        prime-rl's LossOutputs, with ``eapo/positive_weight`` in its metrics.
    """
    from prime_rl.configs.trainer import DefaultLossConfig, IPOLossConfig
    from prime_rl.trainer.rl.loss import default_loss_fn, ipo_loss_fn

    losses: dict[str, tuple[Callable[..., Any], Any]] = {
        "default": (default_loss_fn, DefaultLossConfig), "ipo": (ipo_loss_fn, IPOLossConfig),
    }  # fmt: skip
    require(base in losses, "base", f"one of {', '.join(losses)}", repr(base))
    if "weight" not in _PRIME:
        _PRIME["weight"] = StepWeight(directory=directory)
    step = _PRIME["weight"]
    advantages = step.weigh(inputs.advantages, inputs.loss_mask, logp=inputs.inference_logprobs)
    function, config = losses[base]
    outputs = function(dataclasses.replace(inputs, advantages=advantages), config(**settings))
    outputs.metrics["eapo/positive_weight"] = step.eapo.weight.float()
    return outputs


class TorchtitanMixin:
    """Before torchtitan's RL losses (``DAPOLoss``, ``GRPOLoss``): weighs the advantages they are called with."""

    step_weight: StepWeight | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_hook(cls, TorchtitanMixin, "__call__", "a loss of torchtitan's RL experiment")

    def __call__(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: float | None = None, *, generator_logprobs: Tensor,
        advantages: Tensor, loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """torchtitan's loss on weighted advantages; the entropy is estimated from the generator's log-probs, [T]."""
        if self.step_weight is None:
            self.step_weight = StepWeight()
        weighted = self.step_weight.weigh(advantages, loss_mask, logp=generator_logprobs)
        loss, metrics = super().__call__(  # type: ignore[misc]
            logits, labels, global_valid_tokens, generator_logprobs=generator_logprobs, advantages=weighted, loss_mask=loss_mask
        )
        return loss, {**metrics, "eapo/positive_weight/max": self.step_weight.eapo.weight.float()}
