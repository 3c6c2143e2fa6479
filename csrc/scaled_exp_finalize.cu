// Partial sums of the scaled-exponential form to statistics (E13), to the factors that make E the gradient's matrix (E12), and on request to the
// loss and the coefficients of a clipped surrogate (E10): what ops/triton/scaled_exp_finalize.py computes, with its outputs. It reads the
// sums once, not twice: c is known only at the end, and compensated sums make X - c R as exact as if it had been known before.
#include "finish.h"
#include "rows.h"

namespace eapo {

__device__ __forceinline__ void store(const ExpFinalizeArguments& a, int row, const ExpStatistics& s) {
    const float values[8] = {s.logp, s.lse, s.offset, s.log_sum, s.factor, s.target, s.entropy, s.mean_shifted};
    EAPO_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i < 6 || a.fields == 2) a.out[i64(i) * a.n_rows + row] = values[i];
    }
}

// Add tiles ``tile``, tile + PARTS, ... of a thread's rows, four at a time, so that their loads are in flight together.
template <bool ALIGNED>
__device__ __forceinline__ void read_tiles(const ExpFinalizeArguments& a, int begin, int tile, ScaledExpSums (&parts)[RUN]) {
    constexpr int AT_ONCE = 4;
    const float* line = a.sums + i64(tile) * a.n_rows;
    const i64 step = i64(PARTS) * a.n_rows, field = i64(a.tiles) * a.n_rows;
    EAPO_ROLLED
    for (; tile < a.tiles; tile += AT_ONCE * PARTS, line += AT_ONCE * step) {
        Run rest[AT_ONCE], x_exp[AT_ONCE];
        EAPO_UNROLL
        for (int n = 0; n < AT_ONCE; ++n) {
            const bool there = tile + n * PARTS < a.tiles;
            rest[n] = load_run<ALIGNED>(line + n * step, begin, a.n_rows, there);
            x_exp[n] = load_run<ALIGNED>(line + n * step + field, begin, a.n_rows, there && a.fields == 2);
        }
        EAPO_UNROLL
        for (int n = 0; n < AT_ONCE; ++n) {
            EAPO_UNROLL
            for (int i = 0; i < RUN; ++i) {
                parts[i].rest.add(rest[n].of[i]);
                parts[i].x_exp.add(x_exp[n].of[i]);
            }
        }
    }
}

__device__ __forceinline__ void scaled_exp_finalize(const ExpFinalizeArguments& a) {
    const int first = blockIdx.x * ROWS, begin = first + threadIdx.x % LINE_THREADS * RUN;
    const int part = threadIdx.x / LINE_THREADS;
    ScaledExpSums parts[RUN];
    EAPO_UNROLL
    for (int i = 0; i < RUN; ++i) parts[i] = ScaledExpSums::none();
    if (begin < a.n_rows) {
        if (a.n_rows % RUN == 0) {
            read_tiles<true>(a, begin, part, parts);
        } else {
            read_tiles<false>(a, begin, part, parts);
        }
    }
    const ScaledExpSums sums = merge_parts(parts);
    if (threadIdx.x >= WARP) return;
    const int row = first + int(threadIdx.x);
    const bool inside = row < a.n_rows;
    ExpStatistics s = {};
    if (inside) {
        const float scale = a.row_inv_temperature ? a.scale * a.row_inv_temperature[row] : a.scale;
        s = exp_finish(sums, a.offsets[row], a.offsets[a.n_rows + row], scale);
        store(a, row, s);
    }
    if (a.surrogate.coefficient) store_surrogate(a.surrogate, row, inside, s.logp, a.fields == 2 ? s.entropy : 0.0f);
}

}  // namespace eapo

extern "C" __global__ void __launch_bounds__(EAPO_THREADS) scaled_exp_finalize(
    const __grid_constant__ eapo::ExpFinalizeArguments arguments) {
    eapo::scaled_exp_finalize(arguments);
}
