"""The offset k of every row of the scaled-exponential form (E11), before its product: one row dot product with the target's weight.

With a logp_guess (the old policy's log-prob) k = z_y - logp_guess, which is near log sum e^z; without, k = z_y; both less a constant that
moves E to where its dtype is most precise. Any k will do that leaves the row in the dtype's ``Window``; ``scaled_exp_rescue`` finds the
rows where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..projection import Projection
from . import configs
from .configs import Tile
from .launch import Launch, family, operand_arguments, options, product_tile, transform_arguments
from .math import LOG2E, LOWEST, row_scale


class Window(NamedTuple):
    """Where the numbers E = 2^x of a row stand in the range of their dtype, and which rows' are sound.

    Attributes:
        with_guess: log2 S that a perfect logp_guess leads to, S the row's sum of E with the target.
        without_guess: log2 E of the target itself, where there is no logp_guess.
        peak: log2 of the largest E of a row that is redone.
        least, most: bounds of S between which a row is sound.
        largest: what a column tile of a sound row may sum to, so that none of its E is larger; None: nothing to watch.
    """

    with_guess: float
    without_guess: float
    peak: float
    least: float
    most: float
    largest: float | None


_MOST_BITS = 48.0
"""|log2 S| of a sound row is less (33 nats). In fp32's range E would stay a normal number up to 88 bits and more, but sum x E
has terms of the size of the offset's error, which cost the entropy 1e-5 nats at 60 nats; and no honest logp_guess is off by e^33."""

_WIDE = Window(with_guess=0.0, without_guess=0.0, peak=0.0, least=2.0**-_MOST_BITS, most=2.0**_MOST_BITS, largest=None)

_FP16 = Window(with_guess=8.0, without_guess=1.0, peak=8.0, least=1.0, most=2.0**_MOST_BITS, largest=65504.0)
"""fp16 ends at 65504, and rounds to multiples of 2^-24 below 2^-14 (docs/math.md, "In fp16"). So S stands 8 bits above 1, with
8 bits of room for the policy's drift, 5.5 nats either way; S > 1 keeps every p_v = E_v / S as fine as a logit gradient rounded
to fp16. Without a logp_guess S = 2 / p_y, and rows are redone where a token is 2^15 times more likely than the target: 0.9 % of the
tokens that a model sampled itself."""


def window(dtype: torch.dtype) -> Window:
    """The window of E stored in ``dtype``."""
    return _FP16 if dtype == torch.float16 else _WIDE


@dataclass(frozen=True)
class ScaledExpSums:
    """Offsets and partial sums of the scaled-exponential form, from the kernels that fill them to ``scaled_exp_finalize``.

    x_v = z_v / log(2) - k is in bits: E_v = 2^x_v.

    Attributes:
        offsets: [2, N] fp32: k in bits; y_y with z_y = scale * y_y (``math``), at most LOWEST where z_y is -inf.
        values: [1 or 2, column tiles, N] fp32 over the columns of a tile without the target: sum E, then sum x E (entropy).
        block_v: columns of a tile.
        rescue_ids, n_rescue: [N] and [1] int32, the rows that had to be redone with their maximum, in no order, and how many.
    """

    offsets: Tensor
    values: Tensor
    block_v: int
    rescue_ids: Tensor
    n_rescue: Tensor

    @staticmethod
    def empty(projection: Projection, entropy: bool, *, tile: Tile | None = None) -> ScaledExpSums:
        """Uninitialised, for the tile of ``scaled_exp_gemm``."""
        tile = tile or product_tile("scaled_exp_gemm", projection)
        n_rows, new = projection.n_rows, projection.hidden.new_empty
        tiles = triton.cdiv(projection.vocab, tile.block_v)
        return ScaledExpSums(
            offsets=new(2, n_rows, dtype=torch.float32),
            values=new(1 + entropy, tiles, n_rows, dtype=torch.float32),
            block_v=tile.block_v,
            rescue_ids=new(n_rows, dtype=torch.int32),
            n_rescue=new(1, dtype=torch.int32),
        )

    @property
    def entropy(self) -> bool:
        return self.values.shape[0] == 2


@triton.jit(do_not_specialize=["n_rows"])
def row_offsets_kernel(
    offsets, n_rescue, logp_guess, with_guess, without_guess, hidden, weight, bias, targets, row_inv_temperature, scale, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """offsets [2, n_rows]: see ``ScaledExpSums``; n_rescue becomes 0. logp_guess: [n_rows] fp32 or None; one that is not finite is none.

    with_guess, without_guess: see ``Window``, subtracted from the offset of a row with or without a logp_guess.
    hidden [n_rows, dim], weight [*, dim] with strides; targets: [n_rows] int64. Products and sums in fp32.
    """
    if tl.program_id(0) == 0:
        tl.store(n_rescue, 0)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    target = tl.load(targets + rows)  # [BLOCK_N]
    outside = (target < 0) | (target >= n_columns)  # a NaN row, not a read beyond the weight
    target = tl.where(outside, 0, target)
    dims = tl.arange(0, BLOCK_D)
    h_at = hidden + rows[:, None] * hidden_stride_n + dims[None, :].to(tl.int64) * hidden_stride_d
    w_at = weight + target[:, None] * weight_stride_v + dims[None, :].to(tl.int64) * weight_stride_d
    product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, dim, BLOCK_D):
        inside = (dims < dim - d)[None, :]
        h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        product += h * w
        h_at += BLOCK_D * tl.cast(hidden_stride_d, tl.int64)
        w_at += BLOCK_D * tl.cast(weight_stride_d, tl.int64)
    y = tl.sum(product, 1)
    if bias is not None:
        y += tl.load(bias + target * bias_stride).to(tl.float32)  # [BLOCK_N]
        y = tl.where(y < LOWEST, LOWEST, y)
    y = tl.where(outside, float("nan"), y)
    below = tl.zeros([BLOCK_N], tl.float32) + without_guess
    if logp_guess is not None:
        given = tl.load(logp_guess + rows)  # [BLOCK_N]
        below = tl.where(tl.abs(given) < float("inf"), given * LOG2E + with_guess, below)
    k = tl.fma(y, row_scale(row_inv_temperature, scale, rows) * LOG2E, -below)
    k = tl.where(y <= LOWEST, float("inf"), k)  # E = 0: to be redone
    tl.store(offsets + rows, k, mask=mask)  # [BLOCK_N]
    tl.store(offsets + n_rows + rows, y, mask=mask)  # [BLOCK_N]


def row_offsets(
    projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums, *, tile: Tile | None = None
) -> Launch:
    """The launch that fills ``sums.offsets``. targets: [N] int64 in [0, V). logp_guess: [N] fp32 or None."""
    hidden, limits = projection.hidden, window(projection.operand_dtype)
    tile = tile or configs.find("row_offsets", family(hidden.device), hidden.element_size())
    arguments = operand_arguments(projection) | transform_arguments(projection) | {
        "offsets": sums.offsets,
        "n_rescue": sums.n_rescue,
        "logp_guess": None if logp_guess is None else logp_guess.contiguous(),
        "with_guess": limits.with_guess,
        "without_guess": limits.without_guess,
        "targets": targets.contiguous(),
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
    }  # fmt: skip
    del arguments["cap"]
    return Launch(row_offsets_kernel, triton.cdiv(projection.n_rows, tile.block_n), arguments, options(tile), hidden.device)
