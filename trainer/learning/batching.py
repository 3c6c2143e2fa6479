"""Ragged answers -> padded micro-batches and flat response tokens.

The tokens of all answers of a step stand in one row of T; a micro-batch knows which of them are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .. import ranks
from ..records import Rollouts


@dataclass(frozen=True)
class Answers:
    """Answers with what the learner needs of them.

    Attributes:
        prompt_ids, completion_ids: B token lists each.
        rollout_logp: [T] fp32, the engine's log-probs (nats).
        starts: B + 1 offsets into the row of T tokens.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rollout_logp: Tensor
    starts: list[int]

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def length(self, index: int) -> int:
        """Tokens of answer ``index`` together with its prompt."""
        return len(self.prompt_ids[index]) + len(self.completion_ids[index])


def select(rollouts: Rollouts, indices: Sequence[int]) -> Answers:
    """The chosen answers of ``rollouts``, renumbered in the order given."""
    completions = [rollouts.completion_ids[i] for i in indices]
    logp = torch.cat([rollouts.logp[i] for i in indices])
    starts = list(accumulate(map(len, completions), initial=0))
    return Answers([rollouts.prompt_ids[i] for i in indices], completions, logp, starts)


@dataclass(frozen=True)
class MicroBatch:
    """Some answers, padded on the right.

    Attributes:
        input_ids, attention_mask: [b, L] int64.
        rows: [N] int64, flattened positions that predict the response tokens (each one before its token).
        targets: [N] int64, the response tokens.
        sequence_ids: [N] int64, the answer's number among all B.
        tokens: [N] int64, where the tokens stand in the row of T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor
    tokens: Tensor


def plan(answers: Answers, indices: Sequence[int], budget: int) -> list[list[int]]:
    """Cut ``indices`` into micro-batches of at most ``budget`` padded tokens; neighbours have similar lengths.

    One answer longer than the budget is a micro-batch of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(indices, key=answers.length, reverse=True):  # the first of a group is its longest
        if groups and (len(groups[-1]) + 1) * answers.length(groups[-1][0]) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def plan_shares(answers: Answers, indices: Sequence[int], budget: int) -> tuple[list[list[int]], list[list[int]]]:
    """This rank's micro-batches of ``indices``, and those it runs without counting them.

    A sharded model is gathered by all ranks together, so all run it equally often: who has fewer micro-batches repeats the
    shortest answer. On one process there are none of those.
    """
    costs = [answers.length(index) for index in range(len(answers))]
    plans = [plan(answers, share, budget) for share in ranks.shares(costs, list(indices))]
    own = plans[ranks.rank()]
    shortest = min(indices, key=answers.length)
    return own, [[shortest]] * (max(map(len, plans)) - len(own))


def collate(answers: Answers, indices: Sequence[int], device: torch.device) -> MicroBatch:
    """Build the tensors of one micro-batch on ``device``."""
    width = max(map(answers.length, indices))
    input_ids = torch.zeros(len(indices), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows, sequence_ids, tokens = [], [], []
    for place, index in enumerate(indices):
        prompt, completion = answers.prompt_ids[index], answers.completion_ids[index]
        input_ids[place, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        attention_mask[place, : len(prompt) + len(completion)] = 1
        first = place * width + len(prompt) - 1
        rows.append(torch.arange(first, first + len(completion)))
        sequence_ids.append(torch.full((len(completion),), index))
        tokens.append(torch.arange(answers.starts[index], answers.starts[index + 1]))
    chosen = torch.cat(rows)
    fields = (
        input_ids,
        attention_mask,
        chosen,
        input_ids.flatten()[chosen + 1],
        torch.cat(sequence_ids),
        torch.cat(tokens),
    )
    return MicroBatch(*(field.to(device, non_blocking=True) for field in fields))
