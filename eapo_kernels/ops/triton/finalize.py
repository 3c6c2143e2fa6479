"""The last step of a forward pass, one launch over tokens: partial sums become statistics (E2-E4) and, on request, the loss and
the coefficients of a clipped, sign-weighted surrogate (E9, E10; ``backend.SurrogateTerms``)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...types import SUMS
from ..backend import Coefficients, LogitCotangents, SurrogateTerms
from ..statistics import RowStatistics
from . import configs
from .configs import Tile
from .launch import Launch, family, options
from .math import NEG_INF, expm1, log1p
from .sums import PartialSums

N_SUMS = tl.constexpr(len(SUMS))


@triton.jit
def merge_sums(sums, rows, n_rows, n_splits, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr):
    """(row_max, z_target, rest, x_exp, exp2, x_exp2, xx_exp) over all ranges, each [BLOCK_N]; row_max includes the target now.

    Two passes in a fixed order: the maximum first, then every range rescaled to it (the merge of math.md, once per range).
    """
    field = tl.cast(n_splits, tl.int64) * n_rows
    row_max = tl.full(rows.shape, NEG_INF, tl.float32)
    z_target = tl.zeros(rows.shape, tl.float32)
    for split in range(0, n_splits):
        at = sums + tl.cast(split, tl.int64) * n_rows + rows
        row_max = tl.maximum(row_max, tl.load(at))  # [BLOCK_N]
        z_target += tl.load(at + field)  # [BLOCK_N]
    row_max = tl.maximum(row_max, z_target)
    rest = tl.zeros(rows.shape, tl.float32)
    x_exp = tl.zeros(rows.shape, tl.float32)
    exp2 = tl.zeros(rows.shape, tl.float32)
    x_exp2 = tl.zeros(rows.shape, tl.float32)
    xx_exp = tl.zeros(rows.shape, tl.float32)
    for split in range(0, n_splits):
        at = sums + tl.cast(split, tl.int64) * n_rows + rows
        shift = tl.load(at) - row_max  # [BLOCK_N]
        r = tl.exp(shift)
        shift = tl.where(r > 0.0, shift, 0.0)
        part = tl.load(at + 2 * field)  # [BLOCK_N]
        rest += r * part
        if ENTROPY or SECOND_MOMENTS:
            first = tl.load(at + 3 * field)  # [BLOCK_N]
            if SECOND_MOMENTS:
                xx_exp += r * (tl.load(at + 6 * field) + shift * (2.0 * first + shift * part))  # [BLOCK_N]
            x_exp += r * (first + shift * part)
        if SECOND_MOMENTS:
            part = tl.load(at + 4 * field)  # [BLOCK_N]
            exp2 += r * r * part
            x_exp2 += r * r * (tl.load(at + 5 * field) + shift * part)  # [BLOCK_N]
    return row_max, z_target, rest, x_exp, exp2, x_exp2, xx_exp


@triton.jit
def bounded_log_ratio(logp, other):
    """logp - other within +-60, NaN kept."""
    gap = logp - other
    return tl.where(gap < -60.0, -60.0, tl.where(gap > 60.0, 60.0, gap))


@triton.jit
def clipped_surrogate(logp, old_logp, advantage, low, high, dual_clip):
    """(term, d term / d logp, ratio, clipped) of ``SurrogateTerms``, without weight and scale. All [BLOCK_N].

    Where two branches are equal the unclipped one counts: its gradient is kept and the token is not called clipped.
    low, high: bounds of the ratio. dual_clip: number or None.
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
    """Coefficients of a block of tokens and its share of the sums; arguments as in ``finalize_kernel``, vectors [BLOCK_N]."""
    counts = mask
    if valid is not None:
        counts = mask & tl.load(valid + rows).to(tl.int1)  # [BLOCK_N]
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


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def finalize_kernel(
    out, sums, n_rows, n_splits,
    coefficient, totals, sequence_ids, valid, old_logp, scale, advantages, rewards, thresholds, positive_weight,
    negative_weight, ratio_low, ratio_high, dual_clip,
    BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Finish a block of tokens; each program owns its rows of every output.

    out: [4, 6 or 9, n_rows] fp32: logp, lse, row_max, log_sum, then entropy and mean_shifted, then p2, p2_logp, varentropy.
    sums: see ``PartialSums``.
    coefficient: [n_rows] fp32, d loss / d logp. totals: [programs, len(SUMS)] fp32, the block's share of ``types.SUMS``.
    ratio_low, ratio_high: 1 - clip_low, 1 + clip_high. The others from ``sequence_ids`` on: ``SurrogateTerms``. Without
    SURROGATE all of these are None.
    """
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    row_max, z_target, rest, x_exp, exp2, x_exp2, xx_exp = merge_sums(
        sums, rows, n_rows, n_splits, ENTROPY, SECOND_MOMENTS
    )  # fmt: skip

    x = z_target - row_max
    e = tl.exp(x)
    s0 = rest + e
    top = x == 0.0
    log_sum = tl.where(top, log1p(rest), tl.log(s0))
    logp = tl.where(top, -log_sum, x - log_sum)
    at = out + rows
    field = tl.cast(n_rows, tl.int64)
    tl.store(at, logp, mask=mask)  # [BLOCK_N]
    tl.store(at + field, row_max + log_sum, mask=mask)  # [BLOCK_N]
    tl.store(at + 2 * field, row_max, mask=mask)  # [BLOCK_N]
    tl.store(at + 3 * field, log_sum, mask=mask)  # [BLOCK_N]
    x = tl.where(e > 0.0, x, 0.0)  # x e^x -> 0 at x = -inf
    entropy = tl.zeros([BLOCK_N], tl.float32)
    if ENTROPY:
        mean = (x_exp + x * e) / s0
        entropy = log_sum - mean
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(at + 4 * field, entropy, mask=mask)  # [BLOCK_N]
        tl.store(at + 5 * field, mean, mask=mask)  # [BLOCK_N]
    if SECOND_MOMENTS:
        p2 = (exp2 + e * e) / (s0 * s0)
        tl.store(at + 6 * field, p2, mask=mask)  # [BLOCK_N]
        tl.store(at + 7 * field, (x_exp2 + x * (e * e)) / (s0 * s0) - log_sum * p2, mask=mask)  # [BLOCK_N]
        mean = (x_exp + x * e) / s0
        spread = (xx_exp + x * (x * e)) / s0 - mean * mean
        tl.store(at + 8 * field, tl.where(spread < 0.0, 0.0, spread), mask=mask)  # [BLOCK_N]

    if SURROGATE:
        store_surrogate(
            coefficient, totals, block, rows, mask, logp, entropy, sequence_ids, valid, old_logp, scale, advantages, rewards,
            thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
        )  # fmt: skip


class Finalized(NamedTuple):
    """What a finalize launch writes.

    Attributes:
        statistics: of every row.
        coefficient: [N] fp32, d loss / d logp, or None without terms.
        totals: [programs, len(SUMS)] fp32, or None without terms.
    """

    statistics: RowStatistics
    coefficient: Tensor | None
    totals: Tensor | None

    def coefficients(self) -> Coefficients:
        """The blocks' totals are added in a fixed order."""
        assert self.totals is not None
        return Coefficients(LogitCotangents(self.coefficient), self.totals.sum(0))


def surrogate_arguments(terms: SurrogateTerms | None, like: Tensor, programs: int, n_rows: int) -> dict[str, Any]:
    """What ``store_surrogate`` takes, its outputs allocated; all None without terms."""
    names = [f.name for f in fields(SurrogateTerms) if f.name not in ("clip_low", "clip_high")]
    names += ["coefficient", "totals", "ratio_low", "ratio_high"]
    if terms is None:
        return dict.fromkeys(names) | {"SURROGATE": False}
    given = {name: getattr(terms, name, None) for name in names}
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in given.items()} | {
        "coefficient": like.new_empty(n_rows),
        "totals": like.new_empty(programs, len(SUMS)),
        "ratio_low": 1.0 - terms.clip_low,
        "ratio_high": 1.0 + terms.clip_high,
        "SURROGATE": True,
    }


def statistics_of(out: Tensor, *, entropy: bool) -> RowStatistics:
    """The rows of ``out`` [4, 6 or 9, N] by name. entropy: whether its two are wanted; with moments they have places anyway."""
    logp, lse, row_max, log_sum, *more = out
    two, moments = more[:2] if entropy else (None, None), more[2:]
    return RowStatistics(logp, two[0], lse, row_max, log_sum, two[1], *moments)


def finalize(
    partial: PartialSums, terms: SurrogateTerms | None = None, *, tile: Tile | None = None
) -> tuple[Launch, Finalized]:
    """The launch that turns partial sums into statistics, with ``terms`` also into coefficients and sums, and its outputs."""
    sums, entropy, second_moments = partial.values, partial.entropy, partial.second_moments
    n_rows = sums.shape[2]
    tile = tile or configs.find("finalize", family(sums.device), 4)
    programs = triton.cdiv(n_rows, tile.block_n)
    out = sums.new_empty(9 if second_moments else 6 if entropy else 4, n_rows)
    arguments = surrogate_arguments(terms, sums, programs, n_rows) | {
        "out": out,
        "sums": sums,
        "n_rows": n_rows,
        "n_splits": partial.splits,
        "BLOCK_N": tile.block_n,
        "ENTROPY": entropy,
        "SECOND_MOMENTS": second_moments,
    }
    launch = Launch(finalize_kernel, programs, arguments, options(tile), sums.device)
    return launch, Finalized(statistics_of(out, entropy=entropy), arguments["coefficient"], arguments["totals"])
