"""The answers of a step with their questions and scores, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import Method
from eapo_kernels.objectives.advantages import ADVANTAGES

from ..config import Config
from ..learning.batching import select
from ..learning.measure import measure
from ..models.policy import Policy
from ..rewards.scoring import Rewards, Scores
from ..rewards.shared import score_together
from ..runs.console import Console
from .engine import RolloutEngine, Rollouts, Sampling


@dataclass(frozen=True)
class Sampled:
    """B answers.

    Attributes:
        rollouts: their tokens.
        texts: their text.
        columns: the data file's columns, one value for each answer.
        scores: their rewards.
        group_ids: B numbers, equal for the answers that are compared with each other.
        marks: name -> B flags, "reinforce" or "replayed" (see ``shape_batch``); a name that is missing is all False.
        advantages: [B] fp32 CPU that take the place of the method's, or None.
    """

    rollouts: Rollouts
    texts: list[str]
    columns: dict[str, list[Any]]
    scores: Scores
    group_ids: list[int]
    marks: dict[str, list[bool]] = field(default_factory=dict)
    advantages: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def groups(self) -> list[list[int]]:
        """The numbers of the answers of each group, groups in order of their first answer."""
        found: dict[int, list[int]] = {}
        for i, group in enumerate(self.group_ids):
            found.setdefault(group, []).append(i)
        return list(found.values())

    def ordinary(self) -> list[int]:
        """The answers without a mark: those whose log-probs the metrics compare with the engine's."""
        return [i for i in range(len(self)) if not any(flags[i] for flags in self.marks.values())]

    def whole(self) -> list[int]:
        """The answers of the groups in which every answer has a reward."""
        finite = self.scores.total.isfinite().tolist()
        return sorted(i for group in self.groups() if all(finite[j] for j in group) for i in group)

    def chosen(self, indices: Sequence[int]) -> Sampled:
        """Some of the answers, in the order given."""
        s = self.scores
        return Sampled(
            self.rollouts.chosen(indices),
            [self.texts[i] for i in indices],
            {name: [column[i] for i in indices] for name, column in self.columns.items()},
            Scores(s.total[list(indices)], {name: [part[i] for i in indices] for name, part in s.parts.items()}, []),
            [self.group_ids[i] for i in indices],
            {name: [flags[i] for i in indices] for name, flags in self.marks.items()},
            None if self.advantages is None else self.advantages[list(indices)],
        )

    def state_dict(self) -> dict[str, Any]:
        """The answers as plain values and tensors; failures are only text and stay behind."""
        scores = {"total": self.scores.total, "parts": self.scores.parts}
        own = {name: getattr(self, name) for name in ("texts", "columns", "group_ids", "marks", "advantages")}
        return {"rollouts": vars(self.rollouts), "scores": scores, **own}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Sampled:
        """The answers of ``state_dict()``."""
        return cls(**{**state, "rollouts": Rollouts(**state["rollouts"]), "scores": Scores(**state["scores"], failures=[])})

    def marked(self, name: str) -> Sampled:
        """The same answers, all with this mark."""
        return replace(self, marks={**self.marks, name: [True] * len(self)})

    def joined(self, other: Sampled) -> Sampled:
        """These answers and then those; advantages only where both have them."""
        parts = {name: part + other.scores.parts[name] for name, part in self.scores.parts.items()}
        marks = {
            name: self.marks.get(name, [False] * len(self)) + other.marks.get(name, [False] * len(other))
            for name in {**self.marks, **other.marks}
        }
        both = self.advantages is not None and other.advantages is not None
        return Sampled(
            self.rollouts.joined(other.rollouts),
            self.texts + other.texts,
            {name: column + other.columns[name] for name, column in self.columns.items()},
            Scores(torch.cat([self.scores.total, other.scores.total]), parts, self.scores.failures + other.scores.failures),
            self.group_ids + other.group_ids,
            marks,
            torch.cat([self.advantages, other.advantages]) if both else None,  # type: ignore[list-item]
        )


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
        texts = self.policy.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
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
