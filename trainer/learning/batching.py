"""Ragged completions -> micro-batches, packed or padded, and flat completion tokens.

The T tokens of all completions of a step are concatenated in one row; a micro-batch holds the
positions of its own tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from eapo_kernels import TokenSupport

from .. import ranks
from ..records import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """Some completions: packed into one row, or a row for each, padded on the right.

    Attributes:
        input_ids: [b, L] int64, b = 1 if packed.
        attention_mask: [b, L] int64; None if packed.
        lengths: tokens of each sequence of the row; None if padded.
        rows: [N] int64, flattened positions of the hidden states that predict the completion tokens
            (one before each token).
        targets: [N] int64, the completion tokens.
        tokens: [N] int64, positions in the row of T tokens.
        support: of the N tokens, or None: the whole vocabulary.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    lengths: list[int] | None
    rows: Tensor
    targets: Tensor
    tokens: Tensor
    support: TokenSupport | None = field(kw_only=True)


def plan(completions: Rollouts, indices: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Split ``indices`` into micro-batches of at most ``budget`` tokens (with their padding), sorted
    by length.

    A completion longer than the budget is a micro-batch of its own.
    """
    groups: list[list[int]] = []
    used = 0
    for index in sorted(indices, key=completions.length, reverse=True):  # the first of a group is its longest
        size = completions.length(groups[-1][0] if groups and not packed else index)
        if groups and used + size <= budget:
            groups[-1].append(index)
            used += size
        else:
            groups.append([index])
            used = completions.length(index)
    return groups


def plan_shares(
    completions: Rollouts, indices: Sequence[int], budget: int, packed: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """This rank's micro-batches of ``indices``, and micro-batches to run with zero weight.

    A sharded model is gathered by all ranks together, so all ranks must run the same number of
    forward passes. A rank with fewer micro-batches repeats the shortest completion. On one process
    the second list is empty. Completions go to the ranks in order of falling length, each to the one
    with the fewest tokens.
    """
    loads, shares = [0] * ranks.size(), [list[int]() for _ in range(ranks.size())]
    for index in sorted(indices, key=completions.length, reverse=True):
        least = loads.index(min(loads))
        loads[least] += completions.length(index)
        shares[least].append(index)
    plans = [plan(completions, share, budget, packed) for share in shares]
    own = plans[ranks.rank()]
    shortest = min(indices, key=completions.length)
    return own, [[shortest]] * (max(map(len, plans)) - len(own))


def collate(completions: Rollouts, indices: Sequence[int], device: torch.device, packed: bool = False) -> MicroBatch:
    """Build the tensors of one micro-batch on ``device``."""
    lengths = list(map(completions.length, indices))
    width = max(lengths)
    starts = list(accumulate(lengths if packed else [width] * len(lengths), initial=0))
    input_ids = torch.zeros(starts[-1], dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows, tokens = [], []
    for start, length, index in zip(starts, lengths, indices, strict=False):
        prompt, completion = completions.prompt_ids[index], completions.completion_ids[index]
        input_ids[start : start + length] = torch.tensor(prompt + completion)
        attention_mask[start : start + length] = 1
        rows.append(torch.arange(start + len(prompt) - 1, start + length - 1))
        tokens.append(torch.arange(completions.starts[index], completions.starts[index + 1]))
    chosen = torch.cat(rows)
    shape = (1, -1) if packed else (len(indices), width)
    tensors = (chosen, input_ids[chosen + 1], torch.cat(tokens))
    support = None
    if completions.support is not None:
        ids, counts = (torch.cat(parts) for parts in zip(*(completions.support[index] for index in indices), strict=True))
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        support = TokenSupport(ids.long(), offsets).to(device)  # ascending as they were recorded
    return MicroBatch(
        input_ids.view(shape).to(device, non_blocking=True),
        None if packed else attention_mask.view(shape).to(device, non_blocking=True),
        lengths if packed else None,
        *(tensor.to(device, non_blocking=True) for tensor in tensors),
        support=support,
    )
