"""The last step of the scaled-exponential form's forward, one launch over tokens: partial sums become statistics, and on request coefficients of
a clipped surrogate, and the factors that make E, in which the target's entry is zero, the gradient's matrix (E12)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import SurrogateTerms
from ..projection import Projection
from ..statistics import RowStatistics
from . import configs
from .configs import Tile
from .finalize import Finalized, store_surrogate, surrogate_arguments
from .launch import Launch, family, options, transform_arguments
from .math import LN2, LOG2E, LOWEST, NEG_INF, log1p, row_scale
from .offsets import ScaledExpSums
from .scaled_exp_rescue import merge_tiles


@triton.jit(do_not_specialize=["n_rows"])
def scaled_exp_finalize_kernel(
    out, sums, offsets, row_inv_temperature, slope, n_rows, n_tiles,
    coefficient, totals, sequence_ids, valid, old_logp, scale, advantages, rewards, thresholds, positive_weight,
    negative_weight, ratio_low, ratio_high, dual_clip,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Finish a block of tokens (E13); each program owns its rows of every output.

    With x_v = z_v - k, x = x_y, R = sum over v != y of e^(x_v), X the same of x_v e^(x_v), S = R + e^x:

        p_y >= 1/2:  logp = -log1p(R e^-x),  H = -logp - (X - x R) / S      exact however small 1 - p_y is
        else:        logp = x - log S,       H = log S - (X + x e^x) / S

    k is any offset; a wrong one would leave differences of large numbers. So the sums are taken relative to k + c first, 2^c
    the power of two nearest to S: X -> X - c R tile by tile, S -> S 2^-c. A row without any column gives NaN.

    out: [6 or 8, n_rows] fp32: logp, lse, k + c, log_sum, factor, target, then entropy and mean_shifted. factor = -slope / S,
    target = slope R / S, with ``slope`` dz / d(hidden @ weight.T): the row's cotangent of logp times them is the factor of E
    and the target's entry in the gradient (E12). sums, offsets: see ``ScaledExpSums``. n_tiles: column tiles in ``sums``.
    The others: see ``finalize.finalize_kernel``.
    """
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    field = tl.cast(n_rows, tl.int64)
    rest = merge_tiles(sums, rows, n_rows, n_tiles, BLOCK_N, BLOCK_V)
    k = tl.load(offsets + rows)  # [BLOCK_N]
    y = tl.load(offsets + field + rows)  # [BLOCK_N]
    factor = row_scale(row_inv_temperature, slope, rows)
    bits = tl.where(y <= LOWEST, NEG_INF - k, tl.fma(y, factor * LOG2E, -k))  # NaN if every logit is -inf
    e = tl.exp2(bits)
    total = rest + e
    c = tl.floor(tl.log2(total) + 0.5)
    unit = tl.exp2(-c)
    x = (bits - c) * LN2
    confident = rest <= e
    excess = log1p(rest / tl.where(confident, e, 1.0))
    log_sum = tl.where(confident, x + excess, tl.log(total * unit))
    logp = tl.where(confident, -excess, x - log_sum)
    centre = k + c
    moved = centre - k
    lost = (k - (centre - moved)) + (c - moved)  # what the addition rounded away
    offset = centre * LN2
    fitted = log_sum + (
        tl.fma(centre, LN2, -offset) + lost * LN2
    )  # fits the offset that is written: a backward recomputes x from it
    at = out + rows
    tl.store(at, logp, mask=mask)  # [BLOCK_N]
    tl.store(at + field, tl.where(confident, y * factor - logp, offset + fitted), mask=mask)  # [BLOCK_N]
    tl.store(at + 2 * field, offset, mask=mask)  # [BLOCK_N]
    tl.store(at + 3 * field, fitted, mask=mask)  # [BLOCK_N]
    tl.store(at + 4 * field, -factor / total, mask=mask)  # [BLOCK_N]
    tl.store(at + 5 * field, factor * (rest / total), mask=mask)  # [BLOCK_N]
    entropy = tl.zeros([BLOCK_N], tl.float32)
    if ENTROPY:
        x_exp = merge_tiles(sums, rows, n_rows, n_tiles, BLOCK_N, BLOCK_V, c) * LN2
        x = tl.where(e > 0.0, x, 0.0)  # x e^x -> 0 at x = -inf
        entropy = tl.where(confident, excess - (x_exp - x * rest) / total, log_sum - (x_exp + x * e) / total)
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(at + 6 * field, entropy, mask=mask)  # [BLOCK_N]
        tl.store(at + 7 * field, fitted - entropy, mask=mask)  # [BLOCK_N]
    if SURROGATE:
        store_surrogate(
            coefficient, totals, block, rows, mask, logp, entropy, sequence_ids, valid, old_logp, scale, advantages, rewards,
            thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
        )  # fmt: skip


def scaled_exp_statistics(out: Tensor) -> tuple[RowStatistics, Tensor]:
    """The rows of ``out`` [6 or 8, N] by name, and [2, N]: factor and target."""
    logp, lse, offset, log_sum, _, _, *moments = out
    entropy, mean = moments or (None, None)
    return RowStatistics(logp, entropy, lse, offset, log_sum, mean), out[4:6]


def scaled_exp_finalize(
    projection: Projection,
    sums: ScaledExpSums,
    terms: SurrogateTerms | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Launch, Finalized, Tensor]:
    """The launch, its outputs, and [2, N] fp32: what the cotangent of logp is multiplied by to give E's row factor, and the
    target's entry of the gradient.

    ``row_max`` of the statistics is an offset, not the maximum.
    Running it again changes nothing, so coefficients may follow plain statistics.
    """
    n_rows, device = projection.n_rows, projection.hidden.device
    tile = tile or configs.find("scaled_exp_finalize", family(device), 4)
    programs = triton.cdiv(n_rows, tile.block_n)
    out = sums.offsets.new_empty(8 if sums.entropy else 6, n_rows)
    transform = transform_arguments(projection)
    arguments = surrogate_arguments(terms, out, programs, n_rows) | {
        "out": out,
        "sums": sums.values,
        "offsets": sums.offsets,
        "row_inv_temperature": transform["row_inv_temperature"],
        "slope": transform["scale"],
        "n_rows": n_rows,
        "n_tiles": sums.values.shape[1],
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "ENTROPY": sums.entropy,
    }
    statistics, slopes = scaled_exp_statistics(out)
    final = Finalized(statistics, arguments["coefficient"], arguments["totals"])
    return Launch(scaled_exp_finalize_kernel, programs, arguments, options(tile), device), final, slopes
