// The scaled-exponential form's first product (E11): hidden @ weight.T whose epilogue stores E = 2^(scale2 * y - k) in the operands' dtype and sums
// it in fp32. k is known before the product, so no maximum is tracked; where E is more than fp16 holds, the sums tell, and the row
// is redone. A row's own target is stored as 0 and enters no sum. A tile leaves in slices of 64 x 64 numbers, two a pass:
// registers -> shared memory (stmatrix, swizzled) -> TMA, which cuts off the last row and column.
#include "consumer.h"
#include "epilogue.h"

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
constexpr int BUFFERS = 2;  // slices of a group in shared memory: written and read together, in one pass
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
    // The rows' numbers are fetched before the product, which hides the latency.
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
                exclude<Kernel::FRAGMENT>(d[block], half, thread, rows[block][half].target, first, arguments.n_columns, unused);
            }
            Sums sums[2];
            EAPO_UNROLL
            for (int j = 0; j < Kernel::FRAGMENT / 4; j += BUFFERS * SLICE_FRAGMENTS) {
                EAPO_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const Row& row = rows[block][half];
                    Sums part;
                    exponentiate<BUFFERS * SLICE_FRAGMENTS>(d[block], j, half, row.scale2, row.offset, part);
                    add_up(part, 1);
                    sums[half].add(part);
                }
                store_slices(d[block] + 4 * j, first + 8 * j, first_row(unit, block));
            }
            store_sums(sums, unit, block, tile);
        }
    }
    // Sums of this thread's and of the columns ``distance`` lanes away. A shuffle stays where it is: without one a pass, ptxas moves
    // the additions of the whole tile behind the last exponential.
    __device__ __forceinline__ static void add_up(Sums& sums, int distance) {
        sums.rest += __shfl_xor_sync(0xFFFFFFFF, sums.rest, distance);
        if (EAPO_ENTROPY) sums.x_exp += __shfl_xor_sync(0xFFFFFFFF, sums.x_exp, distance);
    }
    // Slices of this group's rows, as many as there are buffers: fragments from d on, to the matrix at (column, row).
    __device__ __forceinline__ void store_slices(const float* d, int column, int row) {
        box_store_wait<0>();  // the stores before have read the buffers; only thread 0 has any, but a branch would cost more
        named_sync(GROUP_BARRIER + group, WARP_GROUP);
        EAPO_UNROLL
        for (int j = 0; j < BUFFERS * SLICE_FRAGMENTS; j += 2) {
            const u32 to = staging + j / SLICE_FRAGMENTS * SLICE_BYTES;
            const int chunk = stored_chunk(j % SLICE_FRAGMENTS, thread % WARP);
            const float* f = d + 4 * j;
            matrices_store(to + swizzled(stored_row(thread / WARP, thread % WARP), chunk),
                           EAPO_PACK(f[0], f[1]), EAPO_PACK(f[2], f[3]), EAPO_PACK(f[4], f[5]), EAPO_PACK(f[6], f[7]));
        }
        written_for_tma();
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
            add_up(sums[half], 2);
            const int index = row_of(unit, block, half);
            if (thread % 4 != 0 || index >= arguments.n_rows) continue;
            float* at = arguments.sums + i64(tile) * arguments.n_rows + index;
            at[0] = sums[half].rest;
            if (EAPO_ENTROPY) at[field] = sums[half].x_exp;
        }
    }
    __device__ __forceinline__ void end(const Unit&) {}
    __device__ __forceinline__ void finish() {
        if (thread == 0) box_store_wait<0>();  // shared memory outlives its readers
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
