"""From a step's batch and the old policy's statistics to the batch that a method learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks import FLOATS, require_number, require_tensor, valid_tokens
from ...errors import require
from ...types import TokenBatch, TokenStats
from ..advantages import ADVANTAGES
from ..reductions import REDUCTIONS, Counts
from .step_stats import StepStats
from .token_weighting import MARKS, STATISTICS, token_entropy

if TYPE_CHECKING:
    from ..method import Method

_BOOLEAN = {"answer", "reinforce", "replayed", "spans"}
_EXTRAS = (*(name for name in STATISTICS if name != "second_moments"), *MARKS)


@torch.no_grad()
def weight_tokens(
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
        method: with a token_weighting; a method without one gets its batch back.
        batch: all responses of the step (of all ranks), with rewards and group_ids; a response's tokens in order. Advantages
            [B] that it brings along take the place of the config's.
        stats: the old policy's statistics of the same tokens, with what ``method.token_weighting.needs``.
        state: the controller's numbers, ``controller.values()``, for token weightings that read them.
        extras: further tensors [N] by name, see ``StepStats``: tempered_logp, nucleus_entropy, teacher_logp (floats), answer,
            reinforce, replayed, spans (bool), turn_ids (int64). What a method does not read is ignored.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random: the same on all ranks, another each step.

    Returns:
        The batch with advantages [N] and, where the method has them, entropy_coef, ratio_penalty and a narrower mask. Pass
        ``select(tokens)`` of it to ``policy_loss`` for every micro-batch, with the denominator of the whole:
        ``loss_denominator`` of this batch, not of the one that went in.

    Raises:
        EapoError, ShapeError: something the token_weighting needs is missing or does not fit.
    """
    token_weighting = method.token_weighting
    if token_weighting is None:
        return batch
    missing = sorted(token_weighting.state - set(state or {}))
    expected = f"{', '.join(sorted(token_weighting.state))} of controller {method.controller!r} for method {method.name!r}"
    require(not missing, "state", expected, f"no {', '.join(missing)}")
    step_stats = _step_stats(method, batch, stats, extras, state, progress, seed)
    shaped = token_weighting(step_stats)
    keep = step_stats.valid if shaped.keep is None else step_stats.valid & shaped.keep

    def kept(values: Tensor | None, otherwise: Tensor | None) -> Tensor | None:
        return otherwise if values is None else torch.where(keep, values, 0.0).float()

    return replace(
        batch,
        advantages=kept(shaped.advantages, None),
        token_advantages=True,
        entropy_coef=kept(shaped.entropy_coef, batch.entropy_coef),
        ratio_penalty=kept(shaped.ratio_penalty, batch.ratio_penalty),
        mask=batch.mask if shaped.keep is None else keep,
    )


@torch.no_grad()
def observed_entropy(
    method: Method, batch: TokenBatch, stats: TokenStats, *, extras: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """What the method's controller is updated with once a step: ``controller.update(*observed_entropy(...))``.

    A sum (nats) and a count, 0-dim fp64: add both over ranks first. For most methods the entropies of all tokens that count;
    SIREN watches those of its peaks. Arguments and errors as in ``weight_tokens``.
    """
    step_stats = _step_stats(method, batch, stats, extras, None, 0.0, 0)
    return token_entropy(step_stats) if method.token_weighting is None else method.token_weighting.observed(step_stats)


def _step_stats(
    method: Method,
    batch: TokenBatch,
    stats: TokenStats,
    extras: Mapping[str, Tensor] | None,
    state: Mapping[str, Tensor] | None,
    progress: float,
    seed: int,
) -> StepStats:
    """The checked step_stats, with zeros at the tokens that do not count."""
    extras, tokens, of = dict(extras or {}), tuple(batch.targets.shape), f"with method {method.name!r}"
    require(batch.rewards is not None, "batch.rewards", f"[B] {of}", None)
    require(batch.group_ids is not None, "batch.group_ids", f"[B] {of}", None)
    require(stats.entropy is not None, "stats.entropy", "[N]", None)
    assert batch.rewards is not None
    assert batch.group_ids is not None
    assert stats.entropy is not None
    group_ids, size = batch.group_ids, tuple(batch.rewards.shape)
    require_tensor("batch.sequence_ids", batch.sequence_ids, tokens, (torch.int64,), batch.targets)
    require_tensor("batch.group_ids", group_ids, size, (torch.int64,), batch.targets)
    if batch.advantages is not None:
        require_tensor("batch.advantages", batch.advantages, size, FLOATS, batch.targets)
    unknown = sorted(set(extras) - set(_EXTRAS))
    require(not unknown, "extras", f"names among {', '.join(_EXTRAS)}", ", ".join(unknown))
    if method.token_weighting is not None:
        given = {"second_moments"} if stats.p2 is not None and stats.p2_logp is not None else set()
        missing = sorted(method.token_weighting.needs - given - set(extras))
        require(
            not missing, "stats, extras", f"{', '.join(sorted(method.token_weighting.needs))} {of}", f"no {', '.join(missing)}"
        )
    for name, value in {"logp": stats.logp, "entropy": stats.entropy, "p2": stats.p2, "p2_logp": stats.p2_logp}.items():
        if value is not None:
            require_tensor(f"stats.{name}", value, tokens, FLOATS, batch.targets)
    for name, value in extras.items():
        dtypes = (torch.bool,) if name in _BOOLEAN else (torch.int64,) if name == "turn_ids" else FLOATS
        require_tensor(f"extras.{name}", value, tokens, dtypes, batch.targets)
    require_number("progress", progress, 0, 1)
    valid = valid_tokens(batch.targets, batch.mask)
    estimator = ADVANTAGES[method.config.advantage] if isinstance(method.config.advantage, str) else method.config.advantage
    ids = torch.where(valid, batch.sequence_ids, 0)
    ones = valid.float()
    lengths = ones.new_zeros(size).index_add_(0, ids, ones)
    counts = Counts(ones, ids, lengths, (lengths > 0).sum().float(), None, method.config.fixed_length)

    def counted(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(valid, values, torch.zeros_like(values))

    logp, entropy = counted(stats.logp), counted(stats.entropy)
    assert logp is not None
    assert entropy is not None
    return StepStats(
        valid=valid,
        sequence_ids=ids,
        rewards=batch.rewards.float(),
        group_ids=group_ids,
        estimator=lambda rewards: estimator(rewards, group_ids),
        given=None if batch.advantages is None else batch.advantages.float(),
        scale=REDUCTIONS[method.config.reduction](counts),
        logp=logp,
        entropy=entropy,
        p2=counted(stats.p2),
        p2_logp=counted(stats.p2_logp),
        state=dict(state or {}),
        progress=progress,
        seed=seed,
        **{name: counted(value) for name, value in extras.items()},
    )
