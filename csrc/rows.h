// The frame of the kernels that finish rows: a program owns EAPO_ROWS = 32 rows, whose partial sums lie as [fields, parts, n_rows].
// Eight threads read a line of 32 rows, 16 bytes each; the program's threads read EAPO_THREADS / 8 lines at once. What each thread
// has merged is merged in a fixed order, and the lanes of the first warp have a row each.
#pragma once

#include "arguments.h"
#include "surrogate.h"

namespace eapo {

using i64 = long long;

constexpr int ROWS = EAPO_ROWS;
constexpr int WARPS = EAPO_THREADS / WARP;
constexpr int RUN = 4;                              // rows of a thread
constexpr int LINE_THREADS = ROWS / RUN;
constexpr int PARTS = EAPO_THREADS / LINE_THREADS;  // lines that are read at once
static_assert(ROWS == WARP, "a lane a row");

// One number of each of a thread's rows.
struct Run {
    float of[RUN];
};

// A line, which points to row 0, where ``there``; else zeros. ALIGNED: every line is, and is read in 16 bytes; else one by one, and
// 0 behind the last row.
template <bool ALIGNED>
__device__ __forceinline__ Run load_run(const float* line, int row, int n_rows, bool there) {
    Run out = {};
    if (ALIGNED) {
        if (there) {
            const float4 four = *reinterpret_cast<const float4*>(line + row);
            out = {four.x, four.y, four.z, four.w};
        }
    } else {
        EAPO_UNROLL
        for (int i = 0; i < RUN; ++i) {
            if (there && row + i < n_rows) out.of[i] = line[row + i];
        }
    }
    return out;
}

// The state (a structure of floats with ``merge``) of the thread ``distance`` lanes away.
template <class State>
__device__ __forceinline__ State from_lane(const State& state, int distance) {
    State other;
    EAPO_UNROLL
    for (int i = 0; i < int(sizeof(State) / sizeof(float)); ++i) {
        reinterpret_cast<float*>(&other)[i] = __shfl_xor_sync(0xFFFFFFFF, reinterpret_cast<const float*>(&state)[i], distance);
    }
    return other;
}

// Merge the parts of every row: those of a warp, then the warps'. In the first warp the result is that of row ``lane``.
template <class State>
__device__ __forceinline__ State merge_parts(State (&parts)[RUN]) {
    constexpr int FIELDS = sizeof(State) / sizeof(float);
    __shared__ float shared[WARPS][FIELDS][ROWS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    EAPO_UNROLL
    for (int i = 0; i < RUN; ++i) {
        EAPO_UNROLL
        for (int distance = LINE_THREADS; distance < WARP; distance *= 2) parts[i].merge(from_lane(parts[i], distance));
        EAPO_UNROLL
        for (int field = 0; field < FIELDS; ++field) {
            if (lane < LINE_THREADS) shared[warp][field][lane * RUN + i] = reinterpret_cast<const float*>(&parts[i])[field];
        }
    }
    __syncthreads();
    State whole = State::none();
    for (int from = 0; from < WARPS; ++from) {
        State part;
        EAPO_UNROLL
        for (int field = 0; field < FIELDS; ++field) reinterpret_cast<float*>(&part)[field] = shared[from][field][lane];
        whole.merge(part);
    }
    return whole;
}

// The coefficient of a row, and the program's totals. Called by all lanes of the first warp; ``inside``: whether the row exists.
__device__ __forceinline__ void store_surrogate(const SurrogateArguments& a, int row, bool inside, float logp, float entropy) {
    RowTerms terms = {};
    if (inside) {
        terms = row_terms(a, row, logp, entropy);
        a.coefficient[row] = terms.d_logp;
    }
    EAPO_UNROLL
    for (int i = 0; i < TOTALS; ++i) {
        float total = terms.totals[i];
        EAPO_UNROLL
        for (int distance = 1; distance < WARP; distance *= 2) total += __shfl_xor_sync(0xFFFFFFFF, total, distance);
        if (threadIdx.x == 0) a.totals[i64(blockIdx.x) * TOTALS + i] = total;
    }
}

}  // namespace eapo
