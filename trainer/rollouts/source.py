"""The first half of a step: the engine samples completions and the rewards score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import Method
from eapo_kernels.objectives.advantages import ADVANTAGES

from ..config import Config
from ..learning.batching import select
from ..learning.measure import measure
from ..models.policy import Policy
from ..records import Rollouts, Sampling, ScoredRollouts
from ..rewards.scoring import Rewards, overlong_penalty
from ..runs.console import Console
from .engines import RolloutEngine


@dataclass
class RolloutSource:
    """Samples and scores completions, for the loop and for rollout hooks. next_prompts: returns the
    next prompts of the sampler, as token ids and columns.
    """

    config: Config
    method: Method
    policy: Policy
    engine: RolloutEngine
    rewards: Rewards
    console: Console
    next_prompts: Callable[[], tuple[list[list[int]], dict[str, list[Any]]]]

    def __post_init__(self) -> None:
        self.step_prompts, self.tokenizer = self.config.rollout.prompts, self.policy.tokenizer

    def draw(
        self, prompts: Sequence[list[int]], columns: dict[str, list[Any]], group_ids: Sequence[int], sampling: Sampling
    ) -> ScoredRollouts:
        """Sample ``sampling.responses`` completions of every prompt and score them. columns,
        group_ids: one entry for each prompt.
        """
        repeats = sampling.responses
        repeated = {name: [value for value in column for _ in range(repeats)] for name, column in columns.items()}
        groups = [group for group in group_ids for _ in range(repeats)]
        return self.score(self.generate(prompts, sampling), repeated, groups)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Rollouts:
        with self.console.phase("rollouts", alone=True) as tick:
            return self.engine.generate(prompts, sampling, tick)

    def score(self, rollouts: Rollouts, columns: dict[str, list[Any]], group_ids: list[int]) -> ScoredRollouts:
        """Score completions. Failures are reported and their scores are NaN. columns, group_ids:
        one entry for each completion.
        """
        texts = self.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        with self.console.phase("rewards", alone=True) as tick:
            scores = self.rewards.score(columns, texts, rollouts.completion_ids, tick)
        own = self.config.rewards
        if own.overlong == "penalty":
            lengths = [len(ids) for ids in rollouts.completion_ids]
            penalty = overlong_penalty(lengths, self.config.rollout.max_new_tokens, own.overlong_window)
            scores = scores.with_part("overlong", penalty)
        for line in scores.failure_lines():
            self.console.line(f"left out: {line}")
        return ScoredRollouts(rollouts, texts, columns, scores, group_ids)

    def entropies(self, sampled: ScoredRollouts) -> list[Tensor]:
        """[length] fp32 CPU for each completion: the policy's entropy at every token (nats)."""
        if sampled.rollouts.entropy is not None:
            return sampled.rollouts.entropy
        completions = select(sampled.rollouts, range(len(sampled)))
        rollout, budget = self.config.rollout, self.config.optim.micro_batch_tokens
        with self.console.phase("entropies") as tick:
            found = measure(self.policy, completions, temperature=rollout.temperature, budget=budget, tick=tick).entropy.cpu()
        return list(found.split([len(ids) for ids in completions.completion_ids]))

    def advantages(self, sampled: ScoredRollouts) -> Tensor:
        """[B] fp32 CPU: the method's advantages of the rewards; NaN in a group with a failed
        reward.
        """
        own = self.method.config.advantage
        estimator = ADVANTAGES[own] if isinstance(own, str) else own
        result, scored = torch.full((len(sampled),), torch.nan), sampled.fully_scored()
        groups = torch.tensor([sampled.group_ids[i] for i in scored], dtype=torch.int64)
        result[scored] = estimator(sampled.scores.total[scored], groups).float()
        return result
