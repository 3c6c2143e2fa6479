"""The records that travel between the trainer's packages, and below all of them: what is sampled, scored and learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tick = Callable[[int, int], None]
"""Called with (done, total) while work goes on; may raise ``Interrupted``."""


def derive_seed(*parts: int) -> int:
    """A seed for one purpose, from the run's seed and what tells the purposes apart: no generator state to keep."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``seed`` decides every random number, so a call is a function of its arguments and the weights."""

    responses: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers; those to prompt ``p`` are ``p * responses`` to ``(p + 1) * responses - 1``. Ragged: no padding.

    Attributes:
        prompt_ids: B token lists, the prompt of each answer.
        completion_ids: B non-empty token lists; the end-of-sequence token is the last one where the answer ended.
        logp: B [length] fp32 CPU, log-prob of each token under the distribution it was drawn from (temperature and
            top-p applied, nats), as the engine computed it.
        truncated: B flags, True where max_new_tokens came before an end-of-sequence token.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logp: list[Tensor]
    truncated: list[bool]

    def chosen(self, indices: Sequence[int]) -> Rollouts:
        """Some of the answers, in the order given."""
        return Rollouts(
            [self.prompt_ids[i] for i in indices],
            [self.completion_ids[i] for i in indices],
            [self.logp[i] for i in indices],
            [self.truncated[i] for i in indices],
        )

    def joined(self, other: Rollouts) -> Rollouts:
        """These answers and then those."""
        return Rollouts(
            self.prompt_ids + other.prompt_ids,
            self.completion_ids + other.completion_ids,
            self.logp + other.logp,
            self.truncated + other.truncated,
        )


@dataclass(frozen=True)
class Failure:
    """One answer that one reward function could not score."""

    function: str
    index: int
    prompt: Any
    answer: str
    reason: str

    def __str__(self) -> str:
        sample = f"prompt {self.prompt!r}, answer {self.answer[:120]!r}"
        return f"reward {self.function} failed on answer {self.index}: {self.reason}; {sample}"


@dataclass(frozen=True)
class Scores:
    """Scores of B answers.

    Attributes:
        total: [B] fp32 CPU, the weighted sum; NaN where the answer must not be trained on.
        parts: function name -> its B scores; None where it did not score the answer or failed on it.
        failures: one entry for each failed score.
        measured: "<function>/<metric>" -> what was measured of the calls, as ``Called.measured``.
    """

    total: Tensor
    parts: dict[str, list[float | None]]
    failures: list[Failure]
    measured: dict[str, float] = field(default_factory=dict)

    def complaints(self, most: int = 3) -> list[str]:
        """The failures as lines to print: the first ones and how many more there are."""
        more = len(self.failures) - most
        return [str(failure) for failure in self.failures[:most]] + ([f"... and {more} more failures"] if more > 0 else [])


@dataclass(frozen=True)
class Sampled:
    """B answers.

    Attributes:
        rollouts: their tokens.
        texts: their text.
        columns: the data file's columns, one value for each answer.
        scores: their rewards.
        group_ids: B numbers, equal for the answers that are compared with each other.
        marks: name -> B flags, "reinforce" or "replayed" (see ``weight_tokens``); a name that is missing is all False.
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
