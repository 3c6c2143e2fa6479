// The kernels' last parameter, beside the TMA descriptors. eapo_kernels/ops/cuda/launch.py mirrors it; a test compares the two field
// by field.
#pragma once

#include "layout.h"

namespace eapo {

struct Arguments {
    float* sums;                       // statistics: [fields, splits, n_rows]; scaled exponentials: [1 or 2, column tiles, n_rows]
    const long long* targets;          // [n_rows]; outside of [0, n_columns): not a token, and the row's statistics are NaN
    const void* bias;                  // [n_columns] operand dtype, read only by builds with EAPO_BIAS
    const float* row_inv_temperature;  // [n_rows] or null
    const float* offsets;              // [n_rows] bits; scaled exponentials only
    long long bias_stride;             // elements
    float scale;                       // z = scale * row_inv_temperature * y
    int n_rows, n_columns;
    int steps;                         // D / BLOCK_D rounded up
    Walk walk;
};

}  // namespace eapo
