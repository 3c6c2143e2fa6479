"""Loss terms in a finalize launch (E9, E10). ``objectives`` has the same equations in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...types import SUMS
from ..dispatch import Coefficients, LogitCotangents, RowStatistics, SurrogateTerms
from .common import expm1

N_SUMS = tl.constexpr(len(SUMS))


@triton.jit
def bounded_log_ratio(logp, other):
    """clamp(logp - other, -60, 60); NaN stays NaN."""
    gap = logp - other
    return tl.where(gap < -60.0, -60.0, tl.where(gap > 60.0, 60.0, gap))


@triton.jit
def clipped_surrogate(logp, old_logp, advantage, low, high, dual_clip):
    """(surrogate_t, its derivative by logp, ratio, clipped) of ``SurrogateTerms``, all [BLOCK_N].

    Where both branches of min are equal, the gradient is the unclipped one's and the token does not
    count as clipped. low, high: bounds of the ratio. dual_clip: number or None.
    """
    log_ratio = bounded_log_ratio(logp, old_logp)
    ratio = tl.exp(log_ratio)
    free = ratio * advantage
    limit = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    clipped = limit < free
    term = tl.where(clipped, limit, free)
    if dual_clip is not None:
        floor = dual_clip * advantage
        under = (advantage < 0.0) & (term < floor)
        term = tl.where(under, floor, term)
        clipped = clipped | under
    flat = clipped | (log_ratio != logp - old_logp)
    return term, tl.where(flat, 0.0, free), ratio, clipped


@triton.jit
def store_surrogate(
    coefficient, totals, block, rows, mask, logp, entropy, sequence_ids, valid, old_logp, scale, advantages, rewards,
    thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
):  # fmt: skip
    """Write the coefficients of a block of tokens and its share of the sums (``types.SUMS``).

    coefficient: [N] fp32, d loss / d logp. totals: [programs, len(SUMS)] fp32, row ``block``.
    ratio_low, ratio_high: 1 - clip_low, 1 + clip_high. logp, entropy: values, [BLOCK_N] fp32.
    The others: see ``SurrogateTerms``.
    """
    counts = mask if valid is None else mask & tl.load(valid + rows).to(tl.int1)  # [BLOCK_N]
    sequence = tl.load(sequence_ids + rows)  # [BLOCK_N]
    advantage = tl.load(advantages + sequence)  # [BLOCK_N]
    positive = tl.load(rewards + sequence) > tl.load(thresholds + sequence)  # [BLOCK_N]
    weight = tl.where(positive, tl.load(positive_weight), negative_weight)
    factor = -tl.load(scale + rows) * weight  # [BLOCK_N]
    old = tl.load(old_logp + rows)  # [BLOCK_N]
    term, slope, ratio, clipped = clipped_surrogate(logp, old, advantage, ratio_low, ratio_high, dual_clip)
    tl.store(coefficient + rows, tl.where(counts, factor * slope, 0.0), mask=mask)  # [BLOCK_N]
    gap = -bounded_log_ratio(logp, old)
    totals += block * N_SUMS
    tl.store(totals, tl.sum(tl.where(counts, factor * term, 0.0), 0))
    tl.store(totals + 1, tl.sum(tl.where(counts, entropy, 0.0), 0))
    tl.store(totals + 2, tl.sum(tl.where(counts, ratio, 0.0), 0))
    tl.store(totals + 3, tl.sum(tl.where(counts & clipped, 1.0, 0.0), 0))
    tl.store(totals + 4, tl.sum(tl.where(counts, expm1(gap) - gap, 0.0), 0))
    tl.store(totals + 5, 0.0)


_ARGUMENTS = [*SurrogateTerms._fields, "coefficient", "totals", "ratio_low", "ratio_high"]


def surrogate_arguments(terms: SurrogateTerms | None, like: Tensor, programs: int, n_rows: int) -> dict[str, Any]:
    """The arguments of ``store_surrogate`` with its outputs allocated; all None without terms."""
    if terms is None:
        return dict.fromkeys(_ARGUMENTS) | {"SURROGATE": False}
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in terms._asdict().items()} | {
        "coefficient": like.new_empty(n_rows), "totals": like.new_empty(programs, len(SUMS)),
        "ratio_low": 1.0 - terms.clip_low, "ratio_high": 1.0 + terms.clip_high, "SURROGATE": True,
    }  # fmt: skip


class Finalized(NamedTuple):
    """Outputs of a finalize launch; with terms coefficient [N] and totals [programs, len(SUMS)]."""

    statistics: Callable[[], RowStatistics]  # views of the launch's output; a fused loss needs none
    coefficient: Tensor | None
    totals: Tensor | None

    def coefficients(self) -> Coefficients:
        """The coefficients, and the programs' totals added up in a fixed order."""
        assert self.totals is not None
        return Coefficients(LogitCotangents(self.coefficient), self.totals.sum(0))
