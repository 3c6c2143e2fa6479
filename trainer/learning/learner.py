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

from eapo_kernels import LossOutput, Method, loss_denominator, policy_loss

from ..config import OptimConfig
from ..errors import DivergenceError, Interrupted
from ..models.policy import Policy
from ..rollouts.engine import Tick
from .batching import MicroBatch, collate, plan
from .experience import Experience


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

        Every micro-batch is divided by the counts of its whole minibatch, so how a minibatch is cut changes nothing.
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
            plan(experience.answers, indices.tolist(), optim.micro_batch_tokens)
            for _ in range(optim.epochs)
            for indices in np.array_split(shuffle.permutation(len(experience.answers)), optim.minibatches)
            if len(indices)
        ]
        done, total = count(), sum(map(len, minibatches))
        sums: dict[str, float] = defaultdict(float)
        for number, groups in enumerate(minibatches):

            def progress(first: bool = number == 0) -> None:
                try:
                    tick(next(done), total)
                except Interrupted:
                    if first:
                        self.optimizer.zero_grad(set_to_none=True)
                        raise

            for name, value in self._step(experience, groups, progress).items():
                sums[name] += value / len(minibatches)
        return {**sums, "lr": self.learning_rate(step)}

    def _step(self, experience: Experience, groups: Sequence[Sequence[int]], tick: Callable[[], None]) -> dict[str, float]:
        """One optimizer step on the micro-batches ``groups``."""
        sequences = sum(map(len, groups))
        batches = [collate(experience.answers, group, self.policy.device) for group in groups]
        whole = experience.batch.select(torch.cat([batch.tokens for batch in batches]))
        denominator = loss_denominator(whole, method=self.method, positive_weight=experience.positive_weight)
        sums: dict[str, Tensor] = {}
        loss = counted = positives = torch.zeros((), device=self.policy.device)
        self.optimizer.zero_grad(set_to_none=True)
        for batch, group in zip(batches, groups, strict=True):
            tick()
            out = self._loss(experience, batch, denominator)
            out.loss.backward()
            loss = loss + out.loss.detach()
            counted = counted + out.metrics["tokens"]
            positives = positives + len(group) * out.metrics["eapo/positive_fraction"]
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0) + out.metrics["tokens"] * value
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable(), self.optim.max_grad_norm)
        means = {name: value / counted.clamp_min(1) for name, value in sums.items() if name != "tokens"}
        means["eapo/positive_fraction"] = positives / sequences
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
