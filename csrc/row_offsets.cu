// The offset of every row of the scaled-exponential form (E11): hidden times the target's weight, a warp a row, 16 bytes of each a lane. What
// ops/triton/offsets.py computes, with its outputs.
#include "arguments.h"
#include "finish.h"
#include "ptx.h"

#ifdef EAPO_FP16
#define EAPO_WIDEN from_fp16
#else
#define EAPO_WIDEN from_bf16
#endif

namespace eapo {

constexpr int CHUNK = 16 / ITEM;  // numbers of a load
constexpr int AT_ONCE = 4;        // loads of either row that a lane has in flight

// Eight partial sums, so that none is long: products and sums in fp32.
__device__ __forceinline__ void add_products(u32 a, u32 b, float& low, float& high) {
    low = fma_exact(EAPO_WIDEN(u16(a)), EAPO_WIDEN(u16(b)), low);
    high = fma_exact(EAPO_WIDEN(u16(a >> 16)), EAPO_WIDEN(u16(b >> 16)), high);
}

__device__ __forceinline__ float dot(const u16* a, const u16* b, int dim, int lane) {
    const uint4 *a_chunks = reinterpret_cast<const uint4*>(a), *b_chunks = reinterpret_cast<const uint4*>(b);
    const int chunks = dim / CHUNK;
    float sums[CHUNK] = {};
    EAPO_ROLLED
    for (int first = lane; first < chunks; first += AT_ONCE * WARP) {
        uint4 x[AT_ONCE] = {}, y[AT_ONCE] = {};
        EAPO_UNROLL
        for (int n = 0; n < AT_ONCE; ++n) {
            const int i = first + n * WARP;
            if (i < chunks) x[n] = a_chunks[i], y[n] = b_chunks[i];
        }
        EAPO_UNROLL
        for (int n = 0; n < AT_ONCE; ++n) {
            add_products(x[n].x, y[n].x, sums[0], sums[1]);
            add_products(x[n].y, y[n].y, sums[2], sums[3]);
            add_products(x[n].z, y[n].z, sums[4], sums[5]);
            add_products(x[n].w, y[n].w, sums[6], sums[7]);
        }
    }
    const int last = chunks * CHUNK + lane;  // what fills no chunk is less than a warp
    if (last < dim) sums[0] = fma_exact(EAPO_WIDEN(a[last]), EAPO_WIDEN(b[last]), sums[0]);
    EAPO_UNROLL
    for (int half = CHUNK / 2; half > 0; half /= 2) {
        EAPO_UNROLL
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    for (int distance = 1; distance < WARP; distance *= 2) sums[0] += __shfl_xor_sync(0xFFFFFFFF, sums[0], distance);
    return sums[0];
}

__device__ __forceinline__ void row_offsets(const OffsetArguments& a) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.n_rescue = 0;
    const int row = blockIdx.x * EAPO_ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= a.n_rows) return;
    const i64 target = a.targets[row];
    const bool outside = target < 0 || target >= a.n_columns;  // a NaN row, not a read beyond the weight
    const i64 column = outside ? 0 : target;
    float y = dot(static_cast<const u16*>(a.hidden) + row * a.hidden_stride,
                  static_cast<const u16*>(a.weight) + column * a.weight_stride, a.dim, lane);
    if (lane != 0) return;
    if (a.bias) y = at_least_lowest(y + EAPO_WIDEN(static_cast<const u16*>(a.bias)[column * a.bias_stride]));
    if (outside) y = not_a_number();
    const float scale = a.row_inv_temperature ? a.scale * a.row_inv_temperature[row] : a.scale;
    a.offsets[row] = exp_offset(y, scale, a.logp_guess ? a.logp_guess[row] : not_a_number(), a.with_guess, a.without_guess);
    a.offsets[i64(a.n_rows) + row] = y;
}

}  // namespace eapo

extern "C" __global__ void __launch_bounds__(EAPO_THREADS) row_offsets(const __grid_constant__ eapo::OffsetArguments arguments) {
    eapo::row_offsets(arguments);
}
