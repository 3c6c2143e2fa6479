"""What a step logs, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .batching import Answers
from .diversity import distinct_n
from .learner import Measurement
from .rewards import Scores
from .rollouts import Rollouts


def reward_metrics(scores: Scores, responses: int) -> dict[str, float]:
    """Mean and spread of the reward and of every function's part, over what was scored."""
    groups = scores.total.view(-1, responses)
    whole = groups[groups.isfinite().all(1)]
    spread = whole.std(1)
    result = {
        "reward/mean": whole.mean().item(),
        "reward/std": whole.std().item(),
        "reward/group_std": spread.mean().item(),
        "reward/flat_groups": (spread == 0).float().mean().item(),
        "reward/excluded_groups": float(len(groups) - len(whole)),
    }
    for name, part in scores.parts.items():
        known = torch.tensor([value for value in part if value is not None])
        result[f"reward/{name}/mean"] = known.mean().item() if len(known) else math.nan
        result[f"reward/{name}/std"] = known.std().item() if len(known) > 1 else math.nan
    return result


def rollout_metrics(
    rollouts: Rollouts, texts: Sequence[str], answers: Answers, old: Measurement, responses: int
) -> dict[str, float]:
    """Lengths, diversity, and how far the engine's log-probs are from the trainer's.

    ``rollout/kl`` is the k3 estimate of KL(engine || trainer) (http://joschu.net/blog/kl-approx.html) in nats a token.
    """
    lengths = torch.tensor([float(len(ids)) for ids in rollouts.completion_ids])
    groups = [texts[start : start + responses] for start in range(0, len(texts), responses)]
    gap = old.logp.cpu() - answers.rollout_logp
    return {
        "response/length": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": sum(rollouts.truncated) / len(rollouts.truncated),
        "diversity/distinct_1": sum(distinct_n(group, 1) for group in groups) / len(groups),
        "diversity/distinct_2": sum(distinct_n(group, 2) for group in groups) / len(groups),
        "rollout/logp_gap_mean": gap.abs().mean().item(),
        "rollout/logp_gap_max": gap.abs().max().item(),
        "rollout/kl": (gap.exp() - 1 - gap).mean().item(),
    }


def sample_record(step: int, index: int, columns: dict[str, list[Any]], texts: Sequence[str], scores: Scores) -> dict[str, Any]:
    """One answer as samples.jsonl keeps it."""
    return {
        "step": step,
        "prompt": columns["prompt"][index],
        "completion": texts[index],
        "answer": columns["answer"][index],
        "reward": scores.total[index].item(),
        **{f"reward/{name}": part[index] for name, part in scores.parts.items()},
    }


def whole_groups(scores: Scores, responses: int) -> list[int]:
    """Answers of the groups in which every answer has a reward."""
    valid = scores.total.view(-1, responses).isfinite().all(1)
    return valid.repeat_interleave(responses).nonzero().flatten().tolist()
