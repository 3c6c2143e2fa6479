"""The updates of a step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from eapo_kernels import LossOutput, Method, Options, idle_sequences, loss_denominator, policy_loss

from .. import ranks
from ..config import OptimConfig
from ..errors import ConfigError, DivergenceError, Interrupted
from ..models.policy import Policy
from ..models.weights import full_tensor
from ..records import Tick
from .batching import MicroBatch, collate, plan_shares
from .experience import Experience

SEQUENCE_MEAN = "eapo/positive_fraction"
"""The one metric that is a mean over completions; all others are means over tokens."""
BLOCK = 256
"""Weights whose 8-bit moments share a scale."""


class Learner:
    """The optimizer and its schedule. ``steps`` is the length of the whole run."""

    def __init__(
        self, policy: Policy, method: Method, optim: OptimConfig, *, temperature: float, steps: int,
        gradient_tolerance: float | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.method, self.optim = policy, method, optim
        self.options = Options(gradient_tolerance=gradient_tolerance)
        self.inv_temperature, self.steps = 1 / temperature, steps
        self.optimizer = make_optimizer(policy.trainable(), optim)

    def learning_rate(self, step: int) -> float:
        """The rate of training step ``step`` (from 0)."""
        warmup, peak = self.optim.warmup_steps, self.optim.lr
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.optim.schedule == "constant":
            return peak
        done = (step - warmup) / max(1, self.steps - warmup)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def update(self, experience: Experience, *, step: int, seed: int, tick: Tick) -> dict[str, float]:
        """Train on ``experience``. Returns token means of the loss's metrics, and ``loss``,
        ``grad_norm`` and ``lr``.

        The loss of a micro-batch is divided by the counts of its whole minibatch, so the split into
        micro-batches and ranks does not change the result. All ranks hold all completions, run a
        share of every minibatch, and sum gradients and metrics. With fewer completions than
        minibatches, each completion is a minibatch.

        Completions that add nothing to loss and gradient (a group with equal rewards, a weight of
        zero) are left out of the forward pass. They count in the denominators, but not in the means
        over tokens.

        ``tick`` may raise ``Interrupted`` before the first optimizer step. After it the update
        always finishes, because a run cannot resume from the middle of an update.

        Raises:
            DivergenceError: the loss or the gradient norm is not finite. The weights are those
                after the last finite optimizer step.
        """
        optim = self.optim
        for group in self.optimizer.param_groups:
            rate = self.learning_rate(step)
            group["lr"] = group["lr"].new_tensor(rate) if isinstance(group["lr"], Tensor) else rate
        shuffle = np.random.default_rng(seed)
        minibatches = [
            indices.tolist()
            for _ in range(optim.epochs)
            for indices in np.array_split(shuffle.permutation(len(experience.completions)), optim.minibatches)
            if len(indices)
        ]
        completions, positive_weight = experience.completions, experience.positive_weight
        idle = idle_sequences(experience.batch, method=self.method, positive_weight=positive_weight).tolist()
        plans = []
        for indices in minibatches:  # one forward pass, whose gradient is zero, where all are idle
            trained = [i for i in indices if not idle[i]] or [min(indices, key=completions.length)]
            plans.append(plan_shares(completions, trained, optim.micro_batch_tokens, self.policy.packed))
        done, total = count(), sum(len(own) + len(repeated) for own, repeated in plans)
        sums: dict[str, float] = defaultdict(float)
        for number, (indices, (own, repeated)) in enumerate(zip(minibatches, plans, strict=True)):

            def progress(first: bool = number == 0) -> None:
                try:
                    tick(next(done), total)
                except Interrupted:
                    if first:
                        self.optimizer.zero_grad(set_to_none=True)
                        raise

            for name, value in self._step(experience, indices, own, repeated, progress).items():
                sums[name] += value / len(minibatches)
        return {**sums, "lr": self.learning_rate(step)}

    def _step(
        self,
        experience: Experience,
        indices: Sequence[int],
        own: Sequence[Sequence[int]],
        repeated: Sequence[Sequence[int]],
        tick: Callable[[], None],
    ) -> dict[str, float]:
        """One optimizer step on the completions ``indices``: this rank's micro-batches ``own``, and
        ``repeated`` with zero weight.
        """
        completions, device = experience.completions, self.policy.device
        tokens = [torch.arange(completions.starts[i], completions.starts[i + 1]) for i in indices]
        minibatch = experience.batch.select(torch.cat(tokens).to(device))
        denominator = loss_denominator(minibatch, method=self.method, positive_weight=experience.positive_weight)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self.optimizer.zero_grad(set_to_none=True)
        for number, group in enumerate([*own, *repeated]):
            tick()
            counts = float(number < len(own))
            out = self._loss(experience, collate(completions, group, device, self.policy.packed), denominator, counts)
            (counts * out.loss).backward()
            sums["loss"] += counts * out.loss.detach()
            for name, value in out.metrics.items():
                sums[name] += counts * _share_of(name, out, len(group)) * value
        names = sorted(sums)  # the same order on all ranks
        totals = dict(zip(names, ranks.all_reduce_sum(torch.stack([sums[name] for name in names])), strict=True))
        loss, counted = totals.pop("loss"), totals.pop("tokens").clamp_min(1)
        means = {name: total / (len(indices) if name == SEQUENCE_MEAN else counted) for name, total in totals.items()}
        weights = self.policy.trainable()
        norm = full_tensor(get_total_norm([weight.grad for weight in weights if weight.grad is not None]))
        clip_grads_with_norm_(weights, self.optim.max_grad_norm, norm)
        values = {name: float(value) for name, value in {**means, "loss": loss, "grad_norm": norm}.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                self.optimizer.zero_grad(set_to_none=True)
                raise DivergenceError(f"{name}: expected a finite number, got {values[name]}; no step was taken")
        self.optimizer.step()
        return values

    def _loss(self, experience: Experience, batch: MicroBatch, denominator: Tensor, counts: float) -> LossOutput:
        """What one micro-batch adds to the loss of its minibatch. counts: the factor on it before the
        backward pass.

        The gradient of a trained head is added to its fp32 sum here; with entropy_top_p (siren) the backward pass
        receives it, in the compute dtype.
        """
        token_batch = replace(experience.batch.select(batch.tokens), denominator=denominator, support=batch.support)

        def head(hidden: Tensor, weight: Tensor, **options: Any) -> LossOutput:
            return policy_loss(
                hidden, weight, token_batch, method=self.method, positive_weight=experience.positive_weight,
                inv_temperature=self.inv_temperature, options=self.options, main_grad_scale=counts,
                main_grad=self.policy.main_grad() if self.method.config.entropy_top_p is None else None, **options,
            )  # fmt: skip

        return self.policy(batch.input_ids, batch.attention_mask, batch.rows, head, batch.lengths)


def make_optimizer(weights: Sequence[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer ``optim.optimizer`` of the trained weights.

    Raises:
        ConfigError: its package is not installed.
    """
    numbers: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(weights, **numbers, fused=True)
    check_optimizer(optim)
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(weights, **numbers, block_size=BLOCK)
    if weights[0].device.type == "cpu":  # it compiles its step, for which a CPU may have no compiler
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def check_optimizer(optim: OptimConfig) -> None:
    """Raise ConfigError where the package of the optimizer is not installed."""
    if optim.optimizer == "adamw_8bit" and find_spec("torchao") is None:
        raise ConfigError(
            "optim.optimizer: expected an installed torchao for adamw_8bit (pip install '.[adamw-8bit]'), got none"
        )


def moment_bytes(weights: Iterable[Tensor], optim: OptimConfig, processes: int) -> float:
    """Bytes of the optimizer's two moments on each of ``processes``, of which each has a share of the rows."""
    if optim.optimizer == "adamw":
        return 8 * sum(weight.numel() for weight in weights) / processes
    sizes = [-(-len(weight) // processes) * weight[0].numel() for weight in weights]
    return sum((2 + 8 / BLOCK if size >= 4096 and size % BLOCK == 0 else 8) * size for size in sizes)


def _share_of(name: str, out: LossOutput, sequences: int) -> Tensor | float:
    """What a micro-batch's metric is multiplied by, to be added up over a minibatch."""
    if name == "tokens":
        return 1.0
    return float(sequences) if name == SEQUENCE_MEAN else out.metrics["tokens"]
