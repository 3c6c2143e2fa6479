// The clipped surrogate of a token (docs/math.md E10; ops/backend.py, ``SurrogateTerms``) and its derivative.
#pragma once

#include "arguments.h"

namespace eapo {

// Bounds of the ratio; and the factor of the bound below for negative advantages, infinity where there is none.
struct Clip {
    float low, high, dual;
};

// Of a token: its part of the loss and d loss / d logp; the ratio to the old policy; its estimate of KL(old, new), e^g - 1 - g
// with g = old_logp - logp; whether the clip removed its gradient.
struct Coefficient {
    float loss, d_logp, ratio, old_kl;
    bool clipped;
};

// logp - other within +-60, NaN kept.
EAPO_SHARED float bounded_log_ratio(float logp, float other) {
    const float gap = logp - other;
    return gap < -60.0f ? -60.0f : gap > 60.0f ? 60.0f : gap;
}

// Where two branches are equal the unclipped one counts: its gradient is kept and the token is not called clipped.
EAPO_SHARED Coefficient coefficient(float logp, float old_logp, float advantage, float weight, const Clip& clip) {
    const float log_ratio = bounded_log_ratio(logp, old_logp);
    const float ratio = expf(log_ratio);
    const float free = ratio * advantage;
    const float limit = (ratio < clip.low ? clip.low : ratio > clip.high ? clip.high : ratio) * advantage;
    bool clipped = limit < free;
    float term = clipped ? limit : free;
    const float floor = clip.dual * advantage;
    if (advantage < 0.0f && term < floor) {
        term = floor;
        clipped = true;
    }
    const bool flat = clipped || log_ratio != logp - old_logp;
    const float gap = -log_ratio;
    return {-weight * term, flat ? 0.0f : -weight * free, ratio, expm1f(gap) - gap, clipped};
}

constexpr int TOTALS = 6;  // of types.SUMS: loss, entropy, ratio, clipped, old_kl, kl

// What a row adds to the totals, and d loss / d logp; nothing where it does not count.
struct RowTerms {
    float d_logp, totals[TOTALS];
};

EAPO_SHARED RowTerms row_terms(const SurrogateArguments& a, int row, float logp, float entropy) {
    if (a.valid && !a.valid[row]) return {};
    const long long sequence = a.sequence_ids[row];
    const float sign_weight = a.rewards[sequence] > a.thresholds[sequence] ? *a.positive_weight : a.negative_weight;
    const Clip clip = {a.ratio_low, a.ratio_high, a.dual_clip};
    const Coefficient c = coefficient(logp, a.old_logp[row], a.advantages[sequence], a.scale[row] * sign_weight, clip);
    return {c.d_logp, {c.loss, entropy, c.ratio, c.clipped ? 1.0f : 0.0f, c.old_kl, 0.0f}};
}

}  // namespace eapo
