"""From vocabulary sums to statistics: the last, per-row step that every backend shares (docs/math.md E2-E4).

The sums leave the target column out. Then ``1 - p_y`` is ``rest / s0``, a quotient and not a difference, and the log-prob of
a confident token is ``-log1p(rest)``, exact where ``log(1 + tiny)`` would lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RowSums(NamedTuple):
    """Sums over the vocabulary without the target column, x_v = z_v - row_max. All [N] in the statistics dtype.

    Attributes:
        row_max: max_v z_v, the target included.
        x_target: z_y - row_max <= 0.
        rest: sum e^x.
        x_exp: sum x e^x, or None when no entropy is wanted.
        exp2: sum e^(2x), or None.
        x_exp2: sum x e^(2x), or None.
        xx_exp: sum x^2 e^x, or None.
    """

    row_max: Tensor
    x_target: Tensor
    rest: Tensor
    x_exp: Tensor | None = None
    exp2: Tensor | None = None
    x_exp2: Tensor | None = None
    xx_exp: Tensor | None = None


def merge_ranges(sums: Tensor) -> Tensor:
    """Sums over several ranges of the vocabulary to sums over all of them (docs/math.md E14).

    Args:
        sums: [3, 4 or 7, ranges, N]; fields: row_max, z_target (0 outside the range that holds it), then rest, x_exp, exp2,
            x_exp2 and xx_exp of ``RowSums`` relative to the range's row_max. A range without any column has row_max -inf and
            zero sums.

    Returns:
        [3, 4 or 7, N] relative to the largest row_max.
    """
    row_max, z_target, rest, *moments = sums.unbind(0)
    top = row_max.amax(0)
    shift = row_max - torch.where(top == -torch.inf, 0, top)
    r = shift.exp()
    shift = torch.where(r > 0, shift, 0)
    merged = [top, z_target.sum(0), (r * rest).sum(0)]
    if moments:
        x_exp = moments[0]
        merged.append((r * (x_exp + shift * rest)).sum(0))
    if len(moments) > 1:
        _, exp2, x_exp2, xx_exp = moments
        merged.append((r * r * exp2).sum(0))
        merged.append((r * r * (x_exp2 + shift * exp2)).sum(0))
        merged.append((r * (xx_exp + shift * (2 * x_exp + shift * rest))).sum(0))
    return torch.stack(merged)


class RowStatistics(NamedTuple):
    """What the backward pass needs and the caller gets, [N] each in the statistics dtype (None: not asked for).

    Attributes:
        logp, entropy, lse, p2, p2_logp, varentropy: as in ``TokenStats``.
        row_max: max_v z_v, or any other offset of the row.
        log_sum: log sum e^(z - row_max), so p = e^(z - row_max - log_sum).
        mean_shifted: E_p[z - row_max] (xbar of E3), or None.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    row_max: Tensor
    log_sum: Tensor
    mean_shifted: Tensor | None = None
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    varentropy: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """The same record with a function applied to every tensor that is there."""
        return RowStatistics._make(None if t is None else function(t) for t in self)

    def rows(self, index: slice | Tensor) -> RowStatistics:
        """The statistics of some of the rows."""
        return self.map(lambda t: t[index])


def finish(sums: RowSums) -> RowStatistics:
    """E2-E4 from the sums. A row whose every logit is -inf has no distribution and gives NaN."""
    row_max, x, rest = sums.row_max, sums.x_target, sums.rest
    e = x.exp()
    s0 = rest + e
    log_s0 = s0.log()
    log_sum = torch.where(x == 0, rest.log1p(), log_s0)
    logp = torch.where(x == 0, -log_sum, x - log_s0)  # below the maximum both parts are <= 0: nothing cancels
    entropy = mean = p2 = p2_logp = varentropy = None
    if sums.x_exp is not None:
        mean = (sums.x_exp + _x_times(x, e)) / s0
        entropy = (log_sum - mean).clamp_min(0)
    if sums.exp2 is not None and sums.x_exp2 is not None and sums.xx_exp is not None:
        assert sums.x_exp is not None
        centre = (sums.x_exp + _x_times(x, e)) / s0
        varentropy = ((sums.xx_exp + torch.where(e > 0, x * x * e, torch.zeros_like(e))) / s0 - centre * centre).clamp_min(0)
        p2 = (sums.exp2 + e * e) / (s0 * s0)
        p2_logp = (sums.x_exp2 + _x_times(x, e * e)) / (s0 * s0) - log_sum * p2
    return RowStatistics(logp, entropy, row_max + log_sum, row_max, log_sum, mean, p2, p2_logp, varentropy)


def _x_times(x: Tensor, e: Tensor) -> Tensor:
    """x * e with the limit 0 at x = -inf."""
    return torch.where(e > 0, x * e, torch.zeros_like(e))
