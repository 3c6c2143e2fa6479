// From sums to statistics, once a row (docs/math.md E2-E4, E11, E13): the accurate functions of the compiler, not the fast ones
// of the hot loops. Formulas and names are those of ops/triton/finalize.py, offsets.py and scaled_exp_finalize.py.
#pragma once

#include "online_softmax.h"

namespace eapo {

// A row as ``finalize`` writes it: ops/statistics.py, ``RowStatistics``.
struct RowStatistics {
    float logp, lse, row_max, log_sum, entropy, mean_shifted, p2, p2_logp, varentropy;
};

EAPO_SHARED float at_least_zero(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

// ``sums``: of all columns but the target. Where the target is the top, its 1 in s0 would swallow a small rest: log1p.
EAPO_SHARED RowStatistics finish(RangeSums sums) {
    const float top = larger(sums.row_max, sums.z_target);
    sums.raise(top);
    float x = sums.z_target - top;
    const float e = expf(x), s0 = sums.rest + e;
    RowStatistics out;
    out.row_max = top;
    out.log_sum = x == 0.0f ? log1pf(sums.rest) : logf(s0);
    out.logp = x == 0.0f ? -out.log_sum : x - out.log_sum;
    out.lse = top + out.log_sum;
    x = e == 0.0f ? 0.0f : x;  // x e^x -> 0 at x = -inf
    out.mean_shifted = (sums.x_exp + x * e) / s0;
    out.entropy = at_least_zero(out.log_sum - out.mean_shifted);
    out.p2 = (sums.exp2 + e * e) / (s0 * s0);
    out.p2_logp = (sums.x_exp2 + x * (e * e)) / (s0 * s0) - out.log_sum * out.p2;
    out.varentropy = at_least_zero((sums.xx_exp + x * (x * e)) / s0 - out.mean_shifted * out.mean_shifted);
    return out;
}

// A sum with what its additions have rounded away (Knuth): a difference of two such sums loses nothing.
struct Compensated {
    float sum, lost;

    EAPO_SHARED void add(float x) {
        const float total = sum + x, added = total - sum;
        lost += (sum - (total - added)) + (x - added);
        sum = total;
    }
    EAPO_SHARED void add(const Compensated& other) {
        add(other.sum);
        lost += other.lost;
    }
};

// Sums of the scaled-exponential form over a row's columns but the target: E, and x E with x in bits.
struct ScaledExpSums {
    Compensated rest, x_exp;

    EAPO_SHARED static ScaledExpSums none() { return {{0.0f, 0.0f}, {0.0f, 0.0f}}; }
    EAPO_SHARED void merge(const ScaledExpSums& other) {
        rest.add(other.rest);
        x_exp.add(other.x_exp);
    }
};

// The offset k of a row in bits: z_y less the log-prob that is expected (nats) and ``with_guess``; where that is no number, less
// ``without_guess`` alone. +inf where z_y is -inf: E = 0, to be redone.
EAPO_SHARED float exp_offset(float y, float scale, float expected, float with_guess, float without_guess) {
    const float below = fabsf(expected) < infinite() ? fma_exact(expected, LOG2E, with_guess) : without_guess;
    return y <= LOWEST ? infinite() : fma_exact(y, scale * LOG2E, -below);
}

// A row as ``scaled_exp_finalize`` writes it. The cotangent of logp times ``factor`` is E's row factor in the gradient, times ``target``
// the target's entry (E12).
struct ExpStatistics {
    float logp, lse, offset, log_sum, factor, target, entropy, mean_shifted;
};

// k: the offset; y: the target's, scale * y = z_y.
EAPO_SHARED ExpStatistics exp_finish(const ScaledExpSums& sums, float k, float y, float scale) {
    const float rest = sums.rest.sum + sums.rest.lost;
    const float bits = y <= LOWEST ? -infinite() - k : fma_exact(y, scale * LOG2E, -k);  // NaN if every logit is -inf
    const float e = exp2f(bits), total = rest + e;
    const float c = floorf(log2f(total) + 0.5f);  // everything below is relative to k + c
    float x = (bits - c) * LN2;
    const bool confident = rest <= e;
    const float excess = log1pf(rest / (confident ? e : 1.0f));
    const float log_sum = confident ? x + excess : logf(total * exp2f(-c));
    const float centre = k + c, moved = centre - k;
    const float lost = (k - (centre - moved)) + (c - moved);  // what the addition rounded away
    ExpStatistics out;
    out.logp = confident ? -excess : x - log_sum;
    out.offset = centre * LN2;
    // Fits the offset that is written: a backward recomputes x from it.
    out.log_sum = log_sum + (fma_exact(centre, LN2, -out.offset) + lost * LN2);
    out.lse = confident ? y * scale - out.logp : out.offset + out.log_sum;
    out.factor = -scale / total;
    out.target = scale * (rest / total);
    const float x_exp =
        (fma_exact(-c, sums.rest.sum, sums.x_exp.sum) + fma_exact(-c, sums.rest.lost, sums.x_exp.lost)) * LN2;
    x = e == 0.0f ? 0.0f : x;
    out.entropy = at_least_zero(confident ? excess - (x_exp - x * rest) / total : log_sum - (x_exp + x * e) / total);
    out.mean_shifted = out.log_sum - out.entropy;
    return out;
}

}  // namespace eapo
