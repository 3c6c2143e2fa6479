// What the launchers pass: for products beside the TMA descriptors (ops/cuda/launch.py), for kernels over rows alone
// (ops/cuda/rows.py). Python mirrors the structures, and a test compares the two field by field.
#pragma once

#include "layout.h"

namespace eapo {

// Kernels that multiply.
struct Arguments {
    float* sums;                       // statistics: [fields, splits, n_rows]; exponentials: [1 or 2, column tiles, n_rows]
    const long long* targets;          // [n_rows], outside of [0, n_columns): no token, and statistics are NaN
    const void* bias;                  // [n_columns] operand dtype, read only by builds with EAPO_BIAS
    const float* row_inv_temperature;  // [n_rows] or null
    const float* offsets;              // [n_rows] bits; exponentials only
    long long bias_stride;             // numbers
    float scale;                       // z = scale * row_inv_temperature * y
    int n_rows, n_columns;
    int steps;                         // D / BLOCK_D rounded up
    Walk walk;
};

// A clipped surrogate, ``SurrogateTerms`` of ops/backend.py; row i belongs to sequence sequence_ids[i].
struct SurrogateArguments {
    float* coefficient;             // [n_rows] d loss / d logp, or null: no surrogate, and nothing else here is read
    float* totals;                  // [programs, 6] a program's share of ``types.SUMS``
    const long long* sequence_ids;  // [n_rows]
    const unsigned char* valid;     // [n_rows] rows that count, or null: all
    const float* old_logp;          // [n_rows]
    const float* scale;             // [n_rows]
    const float* advantages;        // [sequences]
    const float* rewards;           // [sequences]
    const float* thresholds;        // [sequences]
    const float* positive_weight;   // one number, where rewards > thresholds
    float negative_weight;          // elsewhere
    float ratio_low, ratio_high;
    float dual_clip;                // infinity: none
};

struct FinalizeArguments {
    float* out;         // [4, 6 or 9, n_rows]: logp, lse, row_max, log_sum; entropy, mean; p2, p2_logp, varentropy
    const float* sums;  // [3, 4 or 7, splits, n_rows]: ``RangeSums``
    int n_rows, splits;
    int fields;         // of ``sums``
    SurrogateArguments surrogate;
};

struct ExpFinalizeArguments {
    float* out;                        // [6 or 8, n_rows]: logp, lse, offset, log_sum, factor, target; entropy, mean
    const float* sums;                 // [1 or 2, tiles, n_rows]: sum E, sum x E
    const float* offsets;              // [2, n_rows]: k in bits, y of the target
    const float* row_inv_temperature;  // [n_rows] or null
    float scale;                       // z = scale * row_inv_temperature * y
    int n_rows, tiles;
    int fields;                        // of ``sums``
    SurrogateArguments surrogate;
};

struct OffsetArguments {
    float* offsets;                    // [2, n_rows]: k in bits, y of the target
    int* n_rescue;                     // one number, set to 0
    const float* logp_guess;                 // [n_rows] expected log-probs, or null
    const void* hidden;                // [n_rows, dim], rows of multiples of 16 bytes
    const void* weight;                // [n_columns, dim], likewise
    const void* bias;                  // [n_columns] or null
    const long long* targets;          // [n_rows]; rows of those outside of [0, n_columns) become NaN
    const float* row_inv_temperature;  // [n_rows] or null
    long long hidden_stride, weight_stride, bias_stride;  // numbers
    float scale;                       // z = scale * row_inv_temperature * y
    float with_guess, without_guess;                // bits by which k is less, with a logp_guess and without: where E's dtype is most precise
    int n_rows, n_columns, dim;
};

}  // namespace eapo
