// What a thread does with its accumulators between two tiles, a row at a time. Register i of a row's half h of a fragment is
// d[4 * j + 2 * h + c], see layout.h; everything is unrolled, so that no accumulator is ever indexed by a variable.
#pragma once

#include "online_softmax.h"
#include "layout.h"

namespace eapo {

// Make the columns that do not count LOWEST: the target, whose y is added to y_target, and those behind the last. ``target``:
// its column, or -1. Most tiles hold neither, and skip this.
template <int FRAGMENT>
EAPO_SHARED void exclude(float* d, int half, int thread, int target, int first_column, int n_columns, float& y_target) {
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

// Absorb a row's part of a tile. Two partial sums, so that the additions do not wait for one another.
template <int FRAGMENT, bool ENTROPY, bool MOMENTS>
EAPO_SHARED void absorb(const float* d, int half, float scale2, RunningSums<ENTROPY, MOMENTS>& sums) {
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

// Overwrite fragments j ... j + COUNT - 1 of a row by E = 2^(scale2 * y - offset) and add their sums (E11). One fused
// multiply-add a logit: the offset is given, so only the result is rounded. One partial sum: additions that wait for one another go
// between the exponentials, which are slower; ptxas puts those of two partial sums behind them.
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
