"""From a step's batch and the old policy's statistics to the batch that a method learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks import FLOATS, require_tensor, valid_tokens
from ...errors import require
from ...types import TokenBatch, TokenStats
from ..advantages import ADVANTAGES
from .evidence import Evidence

if TYPE_CHECKING:
    from ..methods import Method

_EXTRAS = ("tempered_logp", "nucleus_entropy", "teacher_logp", "answer", "turn_ids")


@torch.no_grad()
def shape_batch(
    method: Method,
    batch: TokenBatch,
    stats: TokenStats,
    *,
    state: Mapping[str, Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    seed: int = 0,
) -> TokenBatch:
    """Fix the weights of every token for a whole step, before it is cut into micro-batches.

    Args:
        method: with a shaper; a method without one gets its batch back.
        batch: all responses of the step (of all ranks), with rewards and group_ids; a response's tokens in order.
        stats: the old policy's statistics of the same tokens, with what ``method.shaper.needs``.
        state: the controller's numbers, for shapers that read them.
        extras: further tensors [N] by name, see ``Evidence``: tempered_logp, nucleus_entropy, teacher_logp, answer, turn_ids.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random: the same on all ranks, another each step.

    Returns:
        The batch with advantages [N] and, where the method has them, entropy_coef, ratio_penalty and a narrower mask. Pass
        ``select(tokens)`` of it to ``policy_loss`` for every micro-batch, with the denominator of the whole.

    Raises:
        EapoError, ShapeError: something the shaper needs is missing or does not fit.
    """
    shaper = method.shaper
    if shaper is None:
        return batch
    extras = dict(extras or {})
    require(batch.rewards is not None, "batch.rewards", f"[B] with method {method.name!r}", None)
    require(batch.group_ids is not None, "batch.group_ids", f"[B] with method {method.name!r}", None)
    assert batch.rewards is not None
    assert batch.group_ids is not None
    group_ids, tokens = batch.group_ids, tuple(batch.targets.shape)
    unknown = sorted(set(extras) - set(_EXTRAS))
    require(not unknown, "extras", f"names among {', '.join(_EXTRAS)}", ", ".join(unknown))
    given = {"second_moments"} if stats.p2 is not None else set()
    missing = sorted(shaper.needs - given - set(extras))
    require(
        not missing, "stats, extras", f"{', '.join(sorted(shaper.needs))} for method {method.name!r}", "none of " + str(missing)
    )
    require(stats.entropy is not None, "stats.entropy", "[N]", None)
    assert stats.entropy is not None
    for name, value in {"stats.logp": stats.logp, "stats.entropy": stats.entropy}.items():
        require_tensor(name, value, tokens, FLOATS, batch.targets)
    for name, value in extras.items():
        dtypes = {"answer": (torch.bool,), "turn_ids": (torch.int64,)}.get(name, FLOATS)
        require_tensor(f"extras.{name}", value, tokens, dtypes, batch.targets)
    require(0 <= progress <= 1, "progress", "a number in [0, 1]", progress)
    valid = valid_tokens(batch.targets, batch.mask)
    estimator = ADVANTAGES[method.config.advantage] if isinstance(method.config.advantage, str) else method.config.advantage
    evidence = Evidence(
        valid=valid,
        sequence_ids=batch.sequence_ids,
        rewards=batch.rewards.float(),
        group_ids=group_ids,
        estimator=lambda rewards: estimator(rewards, group_ids),
        logp=torch.where(valid, stats.logp, 0.0),
        entropy=torch.where(valid, stats.entropy, 0.0),
        p2=stats.p2,
        p2_logp=stats.p2_logp,
        state=dict(state or {}),
        progress=progress,
        seed=seed,
        **extras,
    )
    shaped = shaper(evidence)
    keep = valid if shaped.keep is None else valid & shaped.keep
    return replace(
        batch,
        advantages=torch.where(keep, shaped.advantages.float(), 0.0),
        entropy_coef=batch.entropy_coef if shaped.entropy_coef is None else shaped.entropy_coef.float(),
        ratio_penalty=batch.ratio_penalty if shaped.ratio_penalty is None else shaped.ratio_penalty.float(),
        mask=batch.mask if shaped.keep is None else keep,
    )
