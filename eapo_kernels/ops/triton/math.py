"""Device functions that every kernel shares: accurate scalar functions, the logit transform, streaming vocabulary sums.

Only operations that the interpreter has too: no libdevice by name, no inline assembly. All arithmetic is fp32; callers widen
what they load.

A tile of logits travels as ``y`` [BLOCK_N, BLOCK_V] with z = scale * y and a scale > 0 per row: y is hidden @ weight.T + bias,
or tanh of it under a soft-cap (E1). Keeping the scale out lets one multiplication apply temperature, logit scale and log2(e)
together, after the row maximum is subtracted and so without its rounding.

A logit that does not take part (behind the last column, the target's, -inf by its bias) is ``LOWEST``, not -inf: e^x is still
exactly 0, but differences and products with it stay finite, so the hot loop needs no guards. Real logits lie far above it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e20)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to a few ulp, also where 1 + x rounds to 1 (Kahan's correction)."""
    u = 1.0 + x
    d = u - 1.0
    plain = (d == 0.0) | (u == float("inf"))
    return tl.where(plain, x, tl.log(u) * (x / tl.where(plain, 1.0, d)))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 80 to a few ulp, also near 0 (Kahan's correction)."""
    u = tl.exp(x)
    d = u - 1.0
    plain = (d == 0.0) | (u < 1e-8)
    corrected = d * x / tl.where(plain, 1.0, tl.log(tl.where(plain, 2.0, u)))
    return tl.where(d == 0.0, x, tl.where(plain, d, corrected))


@triton.jit
def round_to(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """x fp32 in another dtype, rounded to nearest. WIDEN: the interpreter cuts bf16 off, so its bits are rounded before."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((x == x) & (tl.abs(x) < float("inf")), rounded, x)
    return x.to(dtype)


@triton.jit
def tanh_and_slope(u):
    """(tanh u, 1 - tanh^2 u), each to a few ulp: a polynomial near 0 (Cephes ``tanhf``), e^(-2|u|) elsewhere."""
    w = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - w) / (1.0 + w)
    s = u * u
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    value = tl.where(s < 0.390625, u + u * (s * p), tl.where(u < 0.0, -far, far))
    return value, 4.0 * w / ((1.0 + w) * (1.0 + w))


@triton.jit
def row_scale(row_inv_temperature, scale, rows):
    """scale of z = scale * y, [BLOCK_N].

    row_inv_temperature: pointer to [N] fp32, or None. rows: [BLOCK_N] int64, clamped to the valid ones.
    """
    factor = tl.zeros(rows.shape, tl.float32) + scale
    if row_inv_temperature is not None:
        factor *= tl.load(row_inv_temperature + rows)  # [BLOCK_N]
    return factor


@triton.jit
def shape_logits(raw, bias, bias_stride, columns, cap):
    """(y, slope) from raw logits: E1 without the scale; slope = dy / d(cap * (raw + bias)), or 1 without soft-cap.

    raw: [BLOCK_N, BLOCK_V]. bias: pointer or None. columns: [BLOCK_V], clamped to the valid ones. cap: logit_scale / softcap,
    or None.
    """
    y = raw
    slope = 1.0
    if bias is not None:
        y += tl.load(bias + columns.to(tl.int64) * bias_stride).to(tl.float32)[None, :]  # [1, BLOCK_V]
    if cap is not None:
        y, slope = tanh_and_slope(y * cap)
    elif bias is not None:
        y = tl.where(y < LOWEST, LOWEST, y)
    return y, slope


@triton.jit
def tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V: tl.constexpr):
    """Whether the tile from ``first_column`` on holds a target or sticks out behind the last column: one bool.

    Most tiles do neither, and a branch on it spares them the comparison of every column with every target.
    target: [BLOCK_N] int32, column of each row's target.
    """
    inside = (target >= first_column) & (target < first_column + BLOCK_V)
    return (first_column + BLOCK_V > n_columns) | (tl.max(inside.to(tl.int32), 0) > 0)


@triton.jit
def take_target(y, y_target, target, first_column, n_columns, BLOCK_V: tl.constexpr):
    """(y without the target and the columns behind the last, y_target + the target's logit if it lies in the tile)."""
    columns = tl.arange(0, BLOCK_V)[None, :]
    is_target = columns == (target - first_column)[:, None]
    y_target += tl.sum(tl.where(is_target, y, 0.0), 1)
    return tl.where(is_target | (columns >= n_columns - first_column), LOWEST, y), y_target


@triton.jit
def accumulate(y, y_max, rest, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr):
    """Merge a tile into the running sums of E3 and E4, rescaled to the new maximum.

    With x = (y - y_max) * scale2 in bits, scale2 = scale * log2(e): rest = sum 2^x, x_exp = sum x 2^x, exp2 = sum 4^x,
    x_exp2 = sum x 4^x, xx_exp = sum x^2 2^x. All [BLOCK_N]; y: [BLOCK_N, BLOCK_V].
    """
    new_max = tl.maximum(y_max, tl.max(y, 1))
    shift = (y_max - new_max) * scale2
    r = tl.exp2(shift)
    x = (y - new_max[:, None]) * scale2[:, None]
    e = tl.exp2(x)
    if ENTROPY or SECOND_MOMENTS:
        weighted = x * e
        if SECOND_MOMENTS:  # the square of LOWEST would be infinite
            d = tl.where(r > 0.0, shift, 0.0)
            xx_exp = r * (xx_exp + d * (2.0 * x_exp + d * rest)) + tl.sum(x * weighted, 1)
        x_exp = r * (x_exp + shift * rest) + tl.sum(weighted, 1)
    rest = r * rest + tl.sum(e, 1)
    if SECOND_MOMENTS:
        square = e * e
        x_exp2 = r * r * (x_exp2 + shift * exp2) + tl.sum(x * square, 1)
        exp2 = r * r * exp2 + tl.sum(square, 1)
    return new_max, rest, x_exp, exp2, x_exp2, xx_exp


@triton.jit
def split_columns(tile, BLOCK_V: tl.constexpr):
    """The left and the right half of a tile [BLOCK_N, BLOCK_V]; in a product's layout this moves nothing."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, BLOCK_V // 2]), [0, 2, 1]))


@triton.jit
def online_softmax_update(
    raw, bias, bias_stride, cap, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, target, first_column, n_columns, scale2,
    BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """One step of the stream: a tile of raw logits becomes y, its target goes to ``y_target``, the rest to the sums.

    Both branches end in sums, so that only row vectors leave them: a tile that left a branch would be held twice, which costs
    up to 100 registers a thread. SLICES (1, 2, 4 ...) pieces of the columns one after the other need fewer temporaries.
    """
    if SLICES == 1:
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1)
        y, _ = shape_logits(raw, bias, bias_stride, columns, cap)
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            y, y_target = take_target(y, y_target, target, first_column, n_columns, BLOCK_V)
            y_max, rest, x_exp, exp2, x_exp2, xx_exp = accumulate(
                y, y_max, rest, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY, SECOND_MOMENTS
            )
        else:
            y_max, rest, x_exp, exp2, x_exp2, xx_exp = accumulate(
                y, y_max, rest, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY, SECOND_MOMENTS
            )
    else:
        left, right = split_columns(raw, BLOCK_V)
        y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            left, bias, bias_stride, cap, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, target, first_column, n_columns,
            scale2, BLOCK_V // 2, SLICES // 2, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
        y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            right, bias, bias_stride, cap, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, target,
            first_column + BLOCK_V // 2, n_columns, scale2, BLOCK_V // 2, SLICES // 2, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
    return y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp
