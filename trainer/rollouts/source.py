"""Where the answers of a step come from: sampled by the engine, scored by the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import Method
from eapo_kernels.objectives.advantages import ADVANTAGES

from ..config import Config
from ..learning.batching import select
from ..learning.measure import measure
from ..models.policy import Policy
from ..records import Rollouts, Sampled, Sampling
from ..rewards.scoring import Rewards
from ..rewards.shared import score_together
from ..runs.console import Console
from .engines import RolloutEngine


class AnswerSource:
    """Samples answers and scores them: the first half of a step, for the loop and for rollout hooks."""

    def __init__(
        self,
        config: Config,
        method: Method,
        policy: Policy,
        engine: RolloutEngine,
        rewards: Rewards,
        console: Console,
        questions: Callable[[], tuple[list[list[int]], dict[str, list[Any]]]],
    ) -> None:
        """questions: the next step's, as token ids and columns."""
        self.step_questions, self.tokenizer = config.rollout.prompts, policy.tokenizer
        self.questions = questions
        self.config, self.method, self.policy = config, method, policy
        self.engine, self.rewards, self.console = engine, rewards, console

    def draw(
        self, prompts: Sequence[list[int]], columns: dict[str, list[Any]], group_ids: Sequence[int], sampling: Sampling
    ) -> Sampled:
        """Answer every prompt ``sampling.responses`` times. columns, group_ids: one entry for each prompt."""
        repeats = sampling.responses
        repeated = {name: [value for value in column for _ in range(repeats)] for name, column in columns.items()}
        groups = [group for group in group_ids for _ in range(repeats)]
        return self.score(self.generate(prompts, sampling), repeated, groups)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Rollouts:
        with self.console.phase("rollouts", alone=True) as tick:
            return self.engine.generate(prompts, sampling, tick)

    def score(self, rollouts: Rollouts, columns: dict[str, list[Any]], group_ids: list[int]) -> Sampled:
        """Failed scores are reported and stay NaN. columns, group_ids: one entry for each answer."""
        texts = self.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        with self.console.phase("rewards", alone=True) as tick:
            scores = score_together(self.rewards, columns, texts, rollouts.completion_ids, tick)
        for line in scores.complaints():
            self.console.line(f"left out: {line}")
        return Sampled(rollouts, texts, columns, scores, group_ids)

    def entropies(self, sampled: Sampled) -> list[Tensor]:
        """[length] fp32 CPU for each answer: the policy's entropy at every token (nats)."""
        answers = select(sampled.rollouts, range(len(sampled)))
        rollout, budget = self.config.rollout, self.config.optim.micro_batch_tokens
        with self.console.phase("entropies") as tick:
            found = measure(self.policy, answers, temperature=rollout.temperature, budget=budget, tick=tick).entropy.cpu()
        return list(found.split([len(ids) for ids in answers.completion_ids]))

    def advantages(self, sampled: Sampled) -> Tensor:
        """[B] fp32 CPU: the method's advantages of the rewards; NaN in a group with a failed reward."""
        own = self.method.config.advantage
        estimator = ADVANTAGES[own] if isinstance(own, str) else own
        result, whole = torch.full((len(sampled),), torch.nan), sampled.whole()
        groups = torch.tensor([sampled.group_ids[i] for i in whole], dtype=torch.int64)
        result[whole] = estimator(sampled.scores.total[whole], groups).float()
        return result
