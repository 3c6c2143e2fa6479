// First product of the scaled-exponential form (E11): hidden @ weight.T whose epilogue stores E = 2^(scale2 * y - k) in the operands'
// dtype and sums E in fp32. The offset k is an input, so no maximum is tracked. An E above the range of fp16 shows in the sums, and the
// rescue kernels (ops/triton) recompute the row. The target's E is stored as 0 and left out of the sums. A tile is stored in slices of
// 64 x 64 elements, two per pass: registers -> shared memory (stmatrix, swizzled) -> TMA, which clips at the last row and column.
#include "consumer.h"

#ifdef EAPO_FP16
#define EAPO_PACK pack_fp16
#else
#define EAPO_PACK pack_bf16
#endif

namespace eapo {

using Sums = RunningSums<EAPO_ENTROPY, false>;

constexpr int SLICE = 64;
constexpr int SLICE_FRAGMENTS = SLICE / 8;
constexpr int SLICE_BYTES = MMA_ROWS * SLICE * ITEM;
constexpr int BUFFERS = 2;  // slices of a group in shared memory, written and stored together in one pass
constexpr int STAGING_BYTES = Kernel::CONSUMERS * BUFFERS * SLICE_BYTES;

struct Row {
    float scale2, offset;
    int target;
};

struct Exponentials : Consumer {
    const TensorMap* matrix;
    Row rows[Kernel::M_BLOCKS][2];
    u32 staging;

    __device__ __forceinline__ Exponentials(
        const SharedMemory& shared, const Arguments& arguments, int rank, int group, int thread, const TensorMap* matrix)
        : Consumer(shared, arguments, rank, group, thread), matrix(matrix), staging(shared.extra + group * BUFFERS * SLICE_BYTES) {}

    __device__ __forceinline__ int row_of(const Unit& unit, int block, int half) const {
        return first_row(unit, block) + fragment_row(thread, 2 * half);
    }
    __device__ __forceinline__ void begin(const Unit&) {}
    // Loaded before the product, which hides the latency.
    __device__ __forceinline__ void open(const Unit& unit, int) {
        EAPO_UNROLL
        for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = smaller(row_of(unit, block, half), arguments.n_rows - 1);
                rows[block][half] = {scale(row) * LOG2E, arguments.offsets[row], target(row)};
            }
        }
    }
    __device__ __forceinline__ void epilogue(const Unit& unit, int tile) {
        const int first = tile * Kernel::BLOCK_V;
        EAPO_UNROLL
        for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
            add_bias(block, first);
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                float unused = 0.0f;
                mask_columns<Kernel::FRAGMENT>(d[block], half, thread, rows[block][half].target, first, arguments.n_columns, unused);
            }
            Sums sums[2];
            EAPO_UNROLL
            for (int j = 0; j < Kernel::FRAGMENT / 4; j += BUFFERS * SLICE_FRAGMENTS) {
                EAPO_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const Row& row = rows[block][half];
                    Sums part;
                    exponentiate<BUFFERS * SLICE_FRAGMENTS>(d[block], j, half, row.scale2, row.offset, part);
                    add_lane(part, 1);
                    sums[half].add(part);
                }
                store_slices(d[block] + 4 * j, first + 8 * j, first_row(unit, block));
            }
            store_sums(sums, unit, block, tile);
        }
    }
    // Add the sums of the thread ``distance`` lanes away (XOR). ptxas does not move a shuffle: without one per pass it would schedule the
    // additions of the whole tile after the last exponential.
    __device__ __forceinline__ static void add_lane(Sums& sums, int distance) {
        sums.rest += __shfl_xor_sync(0xFFFFFFFF, sums.rest, distance);
        if (EAPO_ENTROPY) sums.x_exp += __shfl_xor_sync(0xFFFFFFFF, sums.x_exp, distance);
    }
    // Store BUFFERS slices of this group's rows: the fragments from d on, to the matrix at (column, row).
    __device__ __forceinline__ void store_slices(const float* d, int column, int row) {
        box_store_wait<0>();  // earlier stores have read the buffers; only thread 0 has stores, but a branch costs more
        named_sync(GROUP_BARRIER + group, WARP_GROUP);
        EAPO_UNROLL
        for (int j = 0; j < BUFFERS * SLICE_FRAGMENTS; j += 2) {
            const u32 to = staging + j / SLICE_FRAGMENTS * SLICE_BYTES;
            const int chunk = stored_chunk(j % SLICE_FRAGMENTS, thread % WARP);
            const float* f = d + 4 * j;
            matrices_store(to + swizzled(stored_row(thread / WARP, thread % WARP), chunk),
                           EAPO_PACK(f[0], f[1]), EAPO_PACK(f[2], f[3]), EAPO_PACK(f[4], f[5]), EAPO_PACK(f[6], f[7]));
        }
        fence_for_tma();
        named_sync(GROUP_BARRIER + group, WARP_GROUP);
        if (thread == 0) {
            EAPO_UNROLL
            for (int i = 0; i < BUFFERS; ++i) box_store(matrix, staging + i * SLICE_BYTES, column + i * SLICE, row);
        }
    }
    // sums [1 or 2, column tiles, n_rows]: sum E, then sum x E with x in bits.
    __device__ __forceinline__ void store_sums(Sums (&sums)[2], const Unit& unit, int block, int tile) {
        const i64 field = i64(arguments.walk.column_tiles) * arguments.n_rows;
        EAPO_UNROLL
        for (int half = 0; half < 2; ++half) {
            add_lane(sums[half], 2);
            const int index = row_of(unit, block, half);
            if (thread % 4 != 0 || index >= arguments.n_rows) continue;
            float* at = arguments.sums + i64(tile) * arguments.n_rows + index;
            at[0] = sums[half].rest;
            if (EAPO_ENTROPY) at[field] = sums[half].x_exp;
        }
    }
    __device__ __forceinline__ void end(const Unit&) {}
    __device__ __forceinline__ void finish() {
        if (thread == 0) box_store_wait<0>();  // shared memory must outlive the stores that read it
    }
};

}  // namespace eapo

extern "C" __global__ void __launch_bounds__(eapo::Kernel::THREADS, 1) __cluster_dims__(EAPO_CLUSTER, 1, 1) scaled_exp_gemm(
    const __grid_constant__ eapo::TensorMap hidden, const __grid_constant__ eapo::TensorMap weight,
    const __grid_constant__ eapo::TensorMap matrix, const __grid_constant__ eapo::Arguments arguments) {
    const auto make = [&](const eapo::SharedMemory& shared, int rank, int group, int thread) {
        return eapo::Exponentials(shared, arguments, rank, group, thread, &matrix);
    };
    eapo::run(&hidden, &weight, arguments, eapo::STAGING_BYTES, make);
}
