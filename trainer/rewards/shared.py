"""Scoring shared among ranks: each scores the completions of some prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import ranks
from ..records import Scores, Tick
from .scoring import Rewards


def score_together(
    rewards: Rewards,
    columns: Mapping[str, Sequence[Any]],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    tick: Tick,
) -> Scores:
    """``rewards.score`` on all ranks. All ranks hold all completions and receive all scores.

    The completions of one prompt (and of its duplicates) are scored by one rank, because functions
    may compare them. A measurement of the calls is the largest value over the ranks. tick: called
    by each rank independently.
    """
    if ranks.size() == 1:
        return rewards.score(columns, texts, completion_ids, tick)
    number: dict[str, int] = {}
    keys = [json.dumps(prompt, sort_keys=True) for prompt in columns["prompt"]]
    owners = [number.setdefault(key, len(number)) % ranks.size() for key in keys]
    shares = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks.size())]
    own = shares[ranks.rank()]

    def score() -> Scores:
        part = {name: [column[i] for i in own] for name, column in columns.items()}
        return rewards.score(part, [texts[i] for i in own], [completion_ids[i] for i in own], tick)

    found = ranks.all_gather(lambda: score() if own else None)
    scores = [(share, part) for share, part in zip(shares, found, strict=True) if part is not None]
    total = torch.empty(len(texts))
    parts: dict[str, list[float | None]] = {name: [None] * len(texts) for name in scores[0][1].parts}
    measured: dict[str, float] = {}
    for share, part in scores:
        total[share] = part.total
        for name, values in part.parts.items():
            for i, value in zip(share, values, strict=True):
                parts[name][i] = value
        for name, amount in part.measured.items():
            measured[name] = max(amount, measured.get(name, amount))
    failures = [replace(failure, index=share[failure.index]) for share, part in scores for failure in part.failures]
    return Scores(total, parts, sorted(failures, key=lambda failure: failure.index), measured)
