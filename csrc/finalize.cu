// Partial sums to statistics (E2-E4, E14), and on request the loss and the coefficients of a clipped surrogate (E10): what
// ops/triton/finalize.py computes, with its outputs. The ranges of a row are read side by side, so that a few rows with many
// ranges do not wait for one load after the other.
#include "finish.h"
#include "rows.h"

namespace eapo {

__device__ __forceinline__ void store(const FinalizeArguments& a, int row, const RowStatistics& s) {
    const float values[9] = {s.logp, s.lse, s.row_max, s.log_sum, s.entropy, s.mean_shifted, s.p2, s.p2_logp, s.varentropy};
    const int n = a.fields == 7 ? 9 : a.fields == 4 ? 6 : 4;
    EAPO_UNROLL
    for (int i = 0; i < 9; ++i) {
        if (i < n) a.out[i64(i) * a.n_rows + row] = values[i];
    }
}

// Merge ranges ``split``, split + PARTS, ... of a thread's rows.
template <bool ALIGNED>
__device__ __forceinline__ void read_ranges(const FinalizeArguments& a, int begin, int split, RangeSums (&parts)[RUN]) {
    const float* line = a.sums + i64(split) * a.n_rows;
    const i64 step = i64(PARTS) * a.n_rows, field = i64(a.splits) * a.n_rows;
    EAPO_ROLLED
    for (; split < a.splits; split += PARTS, line += step) {
        Run runs[7];
        EAPO_UNROLL
        for (int i = 0; i < 7; ++i) runs[i] = load_run<ALIGNED>(line + i * field, begin, a.n_rows, i < a.fields);
        EAPO_UNROLL
        for (int i = 0; i < RUN; ++i) {
            parts[i].merge({runs[0].of[i], runs[1].of[i], runs[2].of[i], runs[3].of[i], runs[4].of[i], runs[5].of[i],
                            runs[6].of[i]});
        }
    }
}

__device__ __forceinline__ void finalize(const FinalizeArguments& a) {
    const int first = blockIdx.x * ROWS, begin = first + threadIdx.x % LINE_THREADS * RUN;
    const int part = threadIdx.x / LINE_THREADS;
    RangeSums parts[RUN];
    EAPO_UNROLL
    for (int i = 0; i < RUN; ++i) parts[i] = RangeSums::none();
    if (begin < a.n_rows) {
        if (a.n_rows % RUN == 0) {
            read_ranges<true>(a, begin, part, parts);
        } else {
            read_ranges<false>(a, begin, part, parts);
        }
    }
    const RangeSums sums = merge_parts(parts);
    if (threadIdx.x >= WARP) return;
    const int row = first + int(threadIdx.x);
    const bool inside = row < a.n_rows;
    RowStatistics s = {};
    if (inside) {
        s = finish(sums);
        store(a, row, s);
    }
    if (a.surrogate.coefficient) store_surrogate(a.surrogate, row, inside, s.logp, a.fields > 3 ? s.entropy : 0.0f);
}

}  // namespace eapo

extern "C" __global__ void __launch_bounds__(EAPO_THREADS) finalize(const __grid_constant__ eapo::FinalizeArguments arguments) {
    eapo::finalize(arguments);
}
