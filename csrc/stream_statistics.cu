// Softmax statistics without stored logits (E3, E4): hidden @ weight.T with an online softmax as its epilogue. Each warp group keeps the
// running sums of its rows over a range of the vocabulary in registers and stores them once; nothing else is written.
#include "consumer.h"

namespace eapo {

using Sums = RunningSums<EAPO_ENTROPY, EAPO_MOMENTS>;

// A row as one thread sees it. The four threads of a row keep separate maxima and sums until the end of the unit.
struct Row {
    float scale2, y_target;
    int target;
    Sums sums;
};

struct Statistics : Consumer {
    Row rows[Kernel::M_BLOCKS][2];

    using Consumer::Consumer;

    __device__ __forceinline__ int row_of(const Unit& unit, int block, int half) const {
        return first_row(unit, block) + fragment_row(thread, 2 * half);
    }
    __device__ __forceinline__ void begin(const Unit& unit) {
        EAPO_UNROLL
        for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = smaller(row_of(unit, block, half), arguments.n_rows - 1);
                const int column = target(row);  // a target outside of the vocabulary makes its row NaN
                rows[block][half] = {scale(row) * LOG2E, column < 0 ? not_a_number() : 0.0f, column, Sums()};
            }
        }
    }
    __device__ __forceinline__ void open(const Unit&, int) {}
    __device__ __forceinline__ void epilogue(const Unit&, int tile) {
        const int first = tile * Kernel::BLOCK_V;
        EAPO_UNROLL
        for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
            add_bias(block, first);
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                Row& row = rows[block][half];
                mask_columns<Kernel::FRAGMENT>(d[block], half, thread, row.target, first, arguments.n_columns, row.y_target);
            }
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                online_softmax_update<Kernel::FRAGMENT>(d[block], half, rows[block][half].scale2, rows[block][half].sums);
            }
        }
    }
    __device__ __forceinline__ void end(const Unit& unit) {
        const int splits = arguments.walk.splits() * (Kernel::PINGPONG ? 2 : 1);
        const int split = Kernel::PINGPONG ? 2 * unit.split + group : unit.split;
        const i64 field = i64(splits) * arguments.n_rows;
        EAPO_UNROLL
        for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
            EAPO_UNROLL
            for (int half = 0; half < 2; ++half) {
                Row& row = rows[block][half];
                for (int distance = 1; distance < 4; distance *= 2) {
                    row.y_target += __shfl_xor_sync(0xFFFFFFFF, row.y_target, distance);
                    row.sums.merge(from(row.sums, distance), row.scale2);
                }
                const int index = row_of(unit, block, half);
                if (thread % 4 != 0 || index >= arguments.n_rows) continue;
                const RangeSums out = row.sums.close(row.y_target, scale(index));
                float* at = arguments.sums + i64(split) * arguments.n_rows + index;
                at[0] = out.row_max;
                at[field] = out.z_target;
                at[2 * field] = out.rest;
                if (EAPO_ENTROPY) at[3 * field] = out.x_exp;
                if (EAPO_MOMENTS) {
                    at[4 * field] = out.exp2;
                    at[5 * field] = out.x_exp2;
                    at[6 * field] = out.xx_exp;
                }
            }
        }
    }
    __device__ __forceinline__ void finish() {}

    // The sums of the thread ``distance`` lanes away (XOR).
    __device__ __forceinline__ static Sums from(const Sums& sums, int distance) {
        Sums other;
        other.y_max = __shfl_xor_sync(0xFFFFFFFF, sums.y_max, distance);
        other.rest = __shfl_xor_sync(0xFFFFFFFF, sums.rest, distance);
        if (EAPO_ENTROPY) other.x_exp = __shfl_xor_sync(0xFFFFFFFF, sums.x_exp, distance);
        if (EAPO_MOMENTS) {
            other.exp2 = __shfl_xor_sync(0xFFFFFFFF, sums.exp2, distance);
            other.x_exp2 = __shfl_xor_sync(0xFFFFFFFF, sums.x_exp2, distance);
            other.xx_exp = __shfl_xor_sync(0xFFFFFFFF, sums.xx_exp, distance);
        }
        return other;
    }
};

}  // namespace eapo

extern "C" __global__ void __launch_bounds__(eapo::Kernel::THREADS, 1) __cluster_dims__(EAPO_CLUSTER, 1, 1) stream_statistics(
    const __grid_constant__ eapo::TensorMap hidden, const __grid_constant__ eapo::TensorMap weight,
    const __grid_constant__ eapo::Arguments arguments) {
    eapo::run(&hidden, &weight, arguments, 0, [&](const eapo::SharedMemory& shared, int rank, int group, int thread) {
        return eapo::Statistics(shared, arguments, rank, group, thread);
    });
}
