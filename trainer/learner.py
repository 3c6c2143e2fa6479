"""The learning half of a step: statistics of the old policy, then the updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eapo_kernels import LossOutput, Method, TokenBatch, policy_loss, token_stats

from .batching import Answers, MicroBatch, collate, plan
from .config import OptimConfig
from .errors import DivergenceError
from .policy import Policy
from .rollouts import Tick


@dataclass(frozen=True)
class Measurement:
    """Log-prob and entropy of every response token under the present policy, both [T] fp32 (nats)."""

    logp: Tensor
    entropy: Tensor


@torch.no_grad()
def measure(policy: Policy, answers: Answers, *, temperature: float, budget: int, tick: Tick) -> Measurement:
    """Teacher-forced statistics of ``answers`` at the sampling temperature, in micro-batches of ``budget`` tokens."""
    logp = torch.zeros(answers.tokens, device=policy.device)
    entropy = torch.zeros_like(logp)
    groups = plan(answers, range(len(answers)), budget)
    for number, group in enumerate(groups):
        tick(number, len(groups))
        batch = collate(answers, group, policy.device)

        def stats(hidden: Tensor, weight: Tensor, targets: Tensor = batch.targets, **head: Any) -> Any:
            return token_stats(hidden, weight, targets, inv_temperature=1 / temperature, entropy="nograd", **head)

        result = policy(batch.input_ids, batch.attention_mask, batch.rows, stats)
        logp[batch.tokens], entropy[batch.tokens] = result.logp, result.entropy
    return Measurement(logp, entropy)


@dataclass(frozen=True)
class Experience:
    """The answers of a step that are learned from.

    Attributes:
        answers: B answers.
        rewards: [B] fp32, finite.
        group_ids: [B] int64, equal for answers to the same question.
        old: statistics under the policy before this step's first update.
        rollout_logp: [T] fp32, the engine's log-probs (nats).
        positive_weight: 0-dim, the controller's weight; None for a method that brings its own.
    """

    answers: Answers
    rewards: Tensor
    group_ids: Tensor
    old: Measurement
    rollout_logp: Tensor
    positive_weight: Tensor | None


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
        Leaving through ``tick`` drops the gradients of the minibatch at hand and keeps the weights.

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
        ]
        done, total = count(), sum(map(len, minibatches))
        sums: dict[str, float] = defaultdict(float)
        for groups in minibatches:
            for name, value in self._step(experience, groups, lambda: tick(next(done), total)).items():
                sums[name] += value / len(minibatches)
        return {**sums, "lr": self.learning_rate(step)}

    def _step(self, experience: Experience, groups: Sequence[Sequence[int]], tick: Callable[[], None]) -> dict[str, float]:
        """One optimizer step on the micro-batches ``groups``."""
        sequences = sum(map(len, groups))
        tokens = sum(len(experience.answers.completion_ids[i]) for group in groups for i in group)
        denominator = tokens if self.method.config.reduction == "token_mean" else sequences
        sums: dict[str, Tensor] = {}
        loss = counted = positives = torch.zeros((), device=self.policy.device)
        self.optimizer.zero_grad(set_to_none=True)
        for group in groups:
            tick()
            batch = collate(experience.answers, group, self.policy.device)
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

    def _loss(self, experience: Experience, batch: MicroBatch, denominator: int) -> LossOutput:
        """What one micro-batch adds to the loss of its minibatch."""
        token_batch = TokenBatch(
            targets=batch.targets,
            sequence_ids=batch.sequence_ids,
            rewards=experience.rewards,
            group_ids=experience.group_ids,
            old_logp=experience.old.logp[batch.tokens],
            rollout_logp=experience.rollout_logp[batch.tokens],
            denominator=denominator,
        )

        def head(hidden: Tensor, weight: Tensor, **options: Any) -> LossOutput:
            return policy_loss(
                hidden, weight, token_batch, method=self.method, positive_weight=experience.positive_weight,
                inv_temperature=self.inv_temperature, **options,
            )  # fmt: skip

        return self.policy(batch.input_ids, batch.attention_mask, batch.rows, head)
