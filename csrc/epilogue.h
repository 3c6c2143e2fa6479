// What a thread does with its accumulators after a tile's product: the online softmax sums of E3 and E4 (docs/math.md), and the scaled
// exponentials of E11. Compiled for the device and, by the tests, for the host.
//
// y is a raw logit, z = scale * y the logit in nats, x = scale2 * (y - y_max) its distance from the maximum in bits, with scale2 =
// scale * log2(e). The subtraction comes first, so x is exact at the maximum however large the logits are. A masked column (after the
// last one, the row's target, a bias of -inf) is LOWEST: 2^x is exactly 0 and x * 2^x is -0, so the inner loop needs no branches.
// Real logits are far above LOWEST. Sums over columns that are all LOWEST are meaningless; the first merge with a real column removes
// them.
//
// Register i of half h of fragment j is d[4 * j + 2 * h + c] (layout.h). Every loop is unrolled, so that no accumulator is indexed by a
// variable.
#pragma once

#include "layout.h"

namespace eapo {

constexpr float LOWEST = -1e20f;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// -inf becomes LOWEST; NaN is kept.
EAPO_SHARED float at_least_lowest(float y) { return y < LOWEST ? LOWEST : y; }

// What stream_statistics writes for a row and a vocabulary range, in nats: ops/triton, ``PartialSums``.
struct RangeSums {
    float row_max, z_target, rest, x_exp, exp2, x_exp2, xx_exp;
};

// Sums of one row over the columns seen so far, x relative to y_max. ENTROPY adds x_exp = sum x 2^x; MOMENTS (with ENTROPY) adds the
// three second moments.
template <bool ENTROPY, bool MOMENTS>
struct RunningSums {
    float y_max = LOWEST;
    float rest = 0.0f, x_exp = 0.0f, exp2 = 0.0f, x_exp2 = 0.0f, xx_exp = 0.0f;

    // Rescale the sums: x becomes x + d (bits).
    EAPO_SHARED void shift(float d) {
        const float r = exp2_fast(d);
        d = r > 0.0f ? d : 0.0f;  // LOWEST squared would be inf, and inf * 0 NaN
        if (MOMENTS) {
            xx_exp = r * (xx_exp + d * (2.0f * x_exp + d * rest));
            x_exp2 = r * r * (x_exp2 + d * exp2);
            exp2 = r * r * exp2;
        }
        if (ENTROPY) x_exp = r * (x_exp + d * rest);
        rest = r * rest;
    }

    // Make the maximum at least y.
    EAPO_SHARED void raise(float y, float scale2) {
        const float top = larger(y_max, y);
        shift((y_max - top) * scale2);
        y_max = top;
    }

    // Add a logit that is at most y_max; returns 2^x.
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

    // The sums in nats. row_max = scale * y_max is rounded, by up to 5e-4 nats where logits are 1e4. The sums are rescaled by the
    // rounding error, so that they match the row_max that is stored.
    EAPO_SHARED RangeSums close(float y_target, float scale) const {
        RangeSums out = {-infinite(), y_target <= LOWEST ? -infinite() : y_target * scale, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (y_max <= LOWEST) {
            if (rest != rest) out.rest = rest;  // fmaxf ignores NaN: every logit may have been NaN
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

// Set masked columns to LOWEST: the target, whose y is added to y_target, and columns after the last one. ``target``: its column, or -1.
// Most tiles contain neither and skip the loop.
template <int FRAGMENT>
EAPO_SHARED void mask_columns(float* d, int half, int thread, int target, int first_column, int n_columns, float& y_target) {
    const int valid = n_columns - first_column;
    const unsigned place = target < 0 ? ~0u : unsigned(target - first_column);
    if (valid >= 2 * FRAGMENT && place >= 2 * FRAGMENT) return;
    EAPO_UNROLL
    for (int j = 0; j < FRAGMENT / 4; ++j) {
        EAPO_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int i = 4 * j + 2 * half + c;
            const int column = fragment_column(thread, i);
            const bool hit = unsigned(column) == place;
            y_target += hit ? d[i] : 0.0f;
            d[i] = hit || column >= valid ? LOWEST : d[i];
        }
    }
}

// Add a row's part of a tile. Two partial sums, so that consecutive additions are independent.
template <int FRAGMENT, bool ENTROPY, bool MOMENTS>
EAPO_SHARED void online_softmax_update(const float* d, int half, float scale2, RunningSums<ENTROPY, MOMENTS>& sums) {
    float even = LOWEST, odd = LOWEST;
    EAPO_UNROLL
    for (int j = 0; j < FRAGMENT / 4; ++j) {
        even = larger(even, d[4 * j + 2 * half]);
        odd = larger(odd, d[4 * j + 2 * half + 1]);
    }
    sums.raise(larger(even, odd), scale2);
    RunningSums<ENTROPY, MOMENTS> a, b;
    EAPO_UNROLL
    for (int j = 0; j < FRAGMENT / 4; ++j) {
        a.add((d[4 * j + 2 * half] - sums.y_max) * scale2);
        b.add((d[4 * j + 2 * half + 1] - sums.y_max) * scale2);
    }
    a.add(b);
    sums.add(a);
}

// Overwrite fragments j ... j + COUNT - 1 of a row with E = 2^(scale2 * y - offset) and add their sums (E11). One fused multiply-add per
// logit. One partial sum: ptxas schedules dependent additions between the slower exponentials, and those of two partial sums after them.
template <int COUNT, bool ENTROPY>
EAPO_SHARED void exponentiate(float* d, int j, int half, float scale2, float offset, RunningSums<ENTROPY, false>& sums) {
    EAPO_UNROLL
    for (int n = 0; n < COUNT; ++n) {
        float* pair = d + 4 * (j + n) + 2 * half;
        pair[0] = sums.add(fma_exact(pair[0], scale2, -offset));
        pair[1] = sums.add(fma_exact(pair[1], scale2, -offset));
    }
}

}  // namespace eapo
