"""The learning half of a step: the updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from eapo_kernels import LossOutput, Method, loss_denominator, policy_loss

from .. import ranks
from ..config import OptimConfig
from ..errors import DivergenceError, Interrupted
from ..models.policy import Policy
from ..models.sharding import whole
from ..records import Tick
from .batching import MicroBatch, collate, plan_shares
from .experience import Experience

SEQUENCE_MEAN = "eapo/positive_fraction"
"""The one metric that is a mean over answers; all others are means over tokens."""


class Learner:
    """Owns the optimizer and its schedule. ``steps`` is the length of the whole run."""

    def __init__(self, policy: Policy, method: Method, optim: OptimConfig, *, temperature: float, steps: int) -> None:
        self.policy, self.method, self.optim = policy, method, optim
        self.inv_temperature, self.steps = 1 / temperature, steps
        self.optimizer = torch.optim.AdamW(policy.trainable(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)

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
        """Learn from ``experience``; returns token means of the loss's metrics, and ``loss``, ``grad_norm`` and ``lr``.

        Every micro-batch is divided by the counts of its whole minibatch, so how that is cut and spread over ranks changes
        nothing: all ranks hold all answers, run a share of every minibatch, and add up gradients and metrics.
        Fewer answers than minibatches are as many minibatches of one answer.
        ``tick`` can end it before the first optimizer step; from then on the update is finished, because there is no going on
        from the middle of one.

        Raises:
            DivergenceError: the loss or the gradient norm is not finite; the weights are those of the last good step.
        """
        optim = self.optim
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        shuffle = np.random.default_rng(seed)
        minibatches = [
            indices.tolist()
            for _ in range(optim.epochs)
            for indices in np.array_split(shuffle.permutation(len(experience.answers)), optim.minibatches)
            if len(indices)
        ]
        plans = [plan_shares(experience.answers, indices, optim.micro_batch_tokens) for indices in minibatches]
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
        """One optimizer step on the answers ``indices``: this rank's micro-batches ``own``, and ``repeated`` for nothing."""
        answers, device = experience.answers, self.policy.device
        tokens = [torch.arange(answers.starts[i], answers.starts[i + 1]) for i in indices]
        minibatch = experience.batch.select(torch.cat(tokens).to(device))
        denominator = loss_denominator(minibatch, method=self.method, positive_weight=experience.positive_weight)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self.optimizer.zero_grad(set_to_none=True)
        for number, group in enumerate([*own, *repeated]):
            tick()
            out = self._loss(experience, collate(answers, group, device), denominator)
            counts = float(number < len(own))
            (counts * out.loss).backward()
            sums["loss"] += counts * out.loss.detach()
            for name, value in out.metrics.items():
                sums[name] += counts * _share_of(name, out, len(group)) * value
        names = sorted(sums)  # the same order on all ranks
        totals = dict(zip(names, ranks.add_up(torch.stack([sums[name] for name in names])), strict=True))
        loss, counted = totals.pop("loss"), totals.pop("tokens").clamp_min(1)
        means = {name: total / (len(indices) if name == SEQUENCE_MEAN else counted) for name, total in totals.items()}
        weights = self.policy.trainable()
        norm = whole(get_total_norm([weight.grad for weight in weights if weight.grad is not None]))
        clip_grads_with_norm_(weights, self.optim.max_grad_norm, norm)
        values = {name: float(value) for name, value in {**means, "loss": loss, "grad_norm": norm}.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                self.optimizer.zero_grad(set_to_none=True)
                raise DivergenceError(f"{name}: expected a finite number, got {values[name]}; no step was taken")
        self.optimizer.step()
        return values

    def _loss(self, experience: Experience, batch: MicroBatch, denominator: Tensor) -> LossOutput:
        """What one micro-batch adds to the loss of its minibatch."""
        token_batch = replace(experience.batch.select(batch.tokens), denominator=denominator)

        def head(hidden: Tensor, weight: Tensor, **options: Any) -> LossOutput:
            return policy_loss(
                hidden, weight, token_batch, method=self.method, positive_weight=experience.positive_weight,
                inv_temperature=self.inv_temperature, **options,
            )  # fmt: skip

        return self.policy(batch.input_ids, batch.attention_mask, batch.rows, head)


def _share_of(name: str, out: LossOutput, sequences: int) -> Tensor | float:
    """What a micro-batch's metric is multiplied by, to be added up over a minibatch."""
    if name == "tokens":
        return 1.0
    return float(sequences) if name == SEQUENCE_MEAN else out.metrics["tokens"]
