// The running sums of E3 and E4 (docs/math.md) of one row in one thread: absorb logits, merge two states, write nats.
//
// Logits travel as y with z = scale * y (nats) and x = scale2 * (y - y_max) (bits), scale2 = scale * log2(e): the difference
// comes first, so that x is exact at the maximum however large the logits are. A column that does not take part (behind the last,
// the row's target, -inf by its bias) is LOWEST: 2^x is exactly 0 and x * 2^x is -0, so the hot loop needs no guards. Real logits
// lie far above it. Sums over columns that are all LOWEST mean nothing, and vanish in the first merge with a real one.
#pragma once

#include "portable.h"

namespace eapo {

constexpr float LOWEST = -1e20f;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// -inf becomes LOWEST, NaN stays.
EAPO_SHARED float at_least_lowest(float y) { return y < LOWEST ? LOWEST : y; }

// What a statistics kernel writes for a row and a vocabulary range, in nats: ops/triton/sums.py, ``PartialSums``. Not in the hot
// loop, so its functions are the accurate ones.
struct RangeSums {
    float row_max, z_target, rest, x_exp, exp2, x_exp2, xx_exp;

    // Of no column.
    EAPO_SHARED static RangeSums none() { return {-infinite(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}; }

    // Move the sums to a maximum ``top`` >= row_max. Those of no column stay zero.
    EAPO_SHARED void raise(float top) {
        float d = row_max == top ? 0.0f : row_max - top;  // -inf - -inf is not a number
        const float r = expf(d);
        d = r == 0.0f ? 0.0f : d;
        xx_exp = r * (xx_exp + d * (2.0f * x_exp + d * rest));
        x_exp2 = r * r * (x_exp2 + d * exp2);
        exp2 = r * r * exp2;
        x_exp = r * (x_exp + d * rest);
        rest = r * rest;
        row_max = top;
    }

    // Sums of other columns of the same row (E14).
    EAPO_SHARED void merge(RangeSums other) {
        const float top = larger(row_max, other.row_max);
        raise(top);
        other.raise(top);
        z_target += other.z_target;
        rest += other.rest;
        x_exp += other.x_exp;
        exp2 += other.exp2;
        x_exp2 += other.x_exp2;
        xx_exp += other.xx_exp;
    }
};

// Sums over the columns seen so far, with x relative to y_max.
// ENTROPY: x_exp = sum x 2^x is wanted; MOMENTS: the three second moments too (with ENTROPY).
template <bool ENTROPY, bool MOMENTS>
struct RunningSums {
    float y_max = LOWEST;
    float rest = 0.0f, x_exp = 0.0f, exp2 = 0.0f, x_exp2 = 0.0f, xx_exp = 0.0f;

    // Move the sums by d bits: x becomes x + d.
    EAPO_SHARED void shift(float d) {
        const float r = exp2_fast(d);
        d = r > 0.0f ? d : 0.0f;  // the square of LOWEST would be infinite, and infinity times 0 not a number
        if (MOMENTS) {
            xx_exp = r * (xx_exp + d * (2.0f * x_exp + d * rest));
            x_exp2 = r * r * (x_exp2 + d * exp2);
            exp2 = r * r * exp2;
        }
        if (ENTROPY) x_exp = r * (x_exp + d * rest);
        rest = r * rest;
    }

    // Raise the maximum to at least y.
    EAPO_SHARED void raise(float y, float scale2) {
        const float top = larger(y_max, y);
        shift((y_max - top) * scale2);
        y_max = top;
    }

    // Add one logit whose maximum has been raised before; returns 2^x.
    EAPO_SHARED float add(float x) {
        const float e = exp2_fast(x);
        rest += e;
        if (MOMENTS) {
            const float weighted = x * e;
            x_exp += weighted;
            xx_exp = fma_exact(x, weighted, xx_exp);
            exp2 = fma_exact(e, e, exp2);
            x_exp2 = fma_exact(weighted, e, x_exp2);
        } else if (ENTROPY) {
            x_exp = fma_exact(x, e, x_exp);
        }
        return e;
    }

    // Add sums that are relative to the same maximum.
    EAPO_SHARED void add(const RunningSums& other) {
        rest += other.rest;
        if (ENTROPY) x_exp += other.x_exp;
        if (MOMENTS) {
            exp2 += other.exp2;
            x_exp2 += other.x_exp2;
            xx_exp += other.xx_exp;
        }
    }

    // Sums of other columns of the same row.
    EAPO_SHARED void merge(RunningSums other, float scale2) {
        raise(other.y_max, scale2);
        other.raise(y_max, scale2);
        add(other);
    }

    // The sums in nats. row_max = scale * y_max is rounded, up to 5e-4 nats where logits are 1e4; the sums move by what that lost,
    // so that they fit the row_max that is written.
    EAPO_SHARED RangeSums close(float y_target, float scale) const {
        RangeSums out = {-infinite(), y_target <= LOWEST ? -infinite() : y_target * scale, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (y_max <= LOWEST) {
            if (rest != rest) out.rest = rest;  // a maximum ignores NaN: here every logit may have been one
            return out;
        }
        const float row_max = y_max * scale;
        RunningSums fitted = *this;
        fitted.shift(fma_exact(y_max, scale, -row_max) * LOG2E);
        out.row_max = row_max;
        out.rest = fitted.rest;
        out.x_exp = fitted.x_exp * LN2;
        out.exp2 = fitted.exp2;
        out.x_exp2 = fitted.x_exp2 * LN2;
        out.xx_exp = fitted.xx_exp * (LN2 * LN2);
        return out;
    }
};

}  // namespace eapo
