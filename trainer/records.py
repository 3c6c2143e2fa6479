"""Records that the trainer's packages exchange. This module imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eapo_kernels.errors import require
from eapo_kernels.objectives.grouping import Groups

Tick = Callable[[int, int], None]
"""Called with (done, total) during a phase of work; may raise ``Interrupted``."""


def derive_seed(*parts: int) -> int:
    """A seed for one purpose, from the run's seed and numbers that identify the purpose. No
    generator state has to be saved.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. ``seed`` determines every random number, so a call is a function of its
    arguments and the weights.
    """

    responses: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_k: int = 0
    min_p: float = 0.0
    record_support: bool = True

    def greedy(self) -> Sampling:
        """One completion of the most probable tokens, in every engine; equal logits are drawn."""
        return replace(self, responses=1, top_k=1, top_p=1.0, min_p=0.0, record_support=False)

    @property
    def filtered(self) -> bool:
        """Whether tokens may be removed before one is drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def support(self) -> bool:
        """Whether the completions carry the tokens that were left."""
        return self.record_support and self.filtered


class Support(NamedTuple):
    """The tokens that top_k, top_p and min_p left at each token of one completion; the drawn one is
    among them.

    Attributes:
        ids: [E] int32 CPU, those of the first token, of the second, ...; ascending for each.
        counts: [length] int32 CPU, their numbers.
    """

    ids: Tensor
    counts: Tensor

    def first(self, tokens: int) -> Support:
        """The support of the first tokens, in memory of its own."""
        counts = self.counts[:tokens].clone()
        return Support(self.ids[: int(counts.sum())].clone(), counts)


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions, ragged. Those of prompt ``p`` are ``p * responses`` to ``(p + 1) *
    responses - 1``.

    Attributes:
        prompt_ids: B token lists, the prompt of each completion.
        completion_ids: B non-empty token lists. A completion that ended has the end-of-sequence
            token as its last one.
        logp: B [length] fp32 CPU, log-prob of each token under the distribution it was drawn from
            (temperature, top-k, top-p and min-p applied, nats), as the engine computed it.
        truncated: B flags, True where max_new_tokens was reached before an end-of-sequence token.
        support: B entries where ``Sampling.support`` asked for it, else None.
        entropy: B [length] fp32 CPU, entropy of the distribution that each token was drawn from (nats);
            None from an engine that does not give it.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logp: list[Tensor]
    truncated: list[bool]
    support: list[Support] | None = None
    entropy: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    @cached_property
    def starts(self) -> list[int]:
        """B + 1 offsets into the row of all T completion tokens."""
        return list(accumulate(map(len, self.completion_ids), initial=0))

    @property
    def tokens(self) -> int:
        """T, the number of completion tokens."""
        return self.starts[-1]

    def length(self, index: int) -> int:
        """Tokens of completion ``index`` and its prompt."""
        return len(self.prompt_ids[index]) + len(self.completion_ids[index])

    def _columns(self) -> dict[str, list[Any]]:
        return {own.name: column for own in fields(self) if (column := getattr(self, own.name)) is not None}

    def take(self, indices: Sequence[int]) -> Rollouts:
        """The completions ``indices``, in that order."""
        return replace(self, **{name: [column[i] for i in indices] for name, column in self._columns().items()})

    def concat(self, other: Rollouts) -> Rollouts:
        """These completions followed by ``other``. Both have a support or none has. Entropies are kept
        where both have them.
        """
        ours, theirs = self._columns(), other._columns()
        require(("support" in ours) == ("support" in theirs), "support", "one of all completions or of none", "one of some")
        return Rollouts(**{name: ours[name] + theirs[name] for name in ours if name in theirs})


@dataclass(frozen=True)
class Failure:
    """A completion that a reward function could not score."""

    function: str
    index: int
    prompt: Any
    completion: str
    reason: str

    def __str__(self) -> str:
        sample = f"prompt {self.prompt!r}, completion {self.completion[:120]!r}"
        return f"reward {self.function} failed on completion {self.index}: {self.reason}; {sample}"


@dataclass(frozen=True)
class Scores:
    """Scores of B completions.

    Attributes:
        total: [B] fp64 CPU, the weighted sum; NaN where the completion must not be trained on.
        parts: function name -> its B scores; None where it did not score the completion or failed
            on it.
        failures: one entry for each failed score.
        seconds: function name -> duration of its calls, of the slowest rank.
    """

    total: Tensor
    parts: dict[str, list[float | None]]
    failures: list[Failure]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredRollouts:
    """B completions with their rewards.

    Attributes:
        rollouts: their tokens.
        texts: their decoded text.
        columns: the data file's columns, one value for each completion.
        scores: their rewards.
        group_ids: B numbers; completions with equal numbers form a group.
    """

    rollouts: Rollouts
    texts: list[str]
    columns: dict[str, list[Any]]
    scores: Scores
    group_ids: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def groups(self) -> list[list[int]]:
        """Indices of the completions of each group, groups in order of their first completion."""
        found: dict[int, list[int]] = {}
        for i, group in enumerate(self.group_ids):
            found.setdefault(group, []).append(i)
        return list(found.values())

    def varied_groups(self) -> list[list[int]]:
        """The groups whose rewards are not all equal."""
        deviations = Groups(self.scores.total, torch.tensor(self.group_ids)).deviations()
        return [group for group in self.groups() if deviations[group].any()]

    def fully_scored(self) -> list[int]:
        """Indices of the completions in groups in which every completion has a reward."""
        finite = self.scores.total.isfinite().tolist()
        return sorted(i for group in self.groups() if all(finite[j] for j in group) for i in group)

    def take(self, indices: Sequence[int]) -> ScoredRollouts:
        """The completions ``indices``, in that order."""
        s = self.scores
        return ScoredRollouts(
            self.rollouts.take(indices),
            [self.texts[i] for i in indices],
            {name: [column[i] for i in indices] for name, column in self.columns.items()},
            Scores(s.total[list(indices)], {name: [part[i] for i in indices] for name, part in s.parts.items()}, []),
            [self.group_ids[i] for i in indices],
        )

    def concat(self, other: ScoredRollouts) -> ScoredRollouts:
        """These completions followed by ``other``."""
        parts = {name: part + other.scores.parts[name] for name, part in self.scores.parts.items()}
        return ScoredRollouts(
            self.rollouts.concat(other.rollouts),
            self.texts + other.texts,
            {name: column + other.columns[name] for name, column in self.columns.items()},
            Scores(torch.cat([self.scores.total, other.scores.total]), parts, self.scores.failures + other.scores.failures),
            self.group_ids + other.group_ids,
        )
