// The machines that execute pipeline.h on the device, and the body of a kernel: roles, start and end.
#pragma once

#include "arguments.h"
#include "epilogue.h"
#include "pipeline.h"
#include "ptx.h"

#if defined(EAPO_BIAS) && defined(EAPO_FP16)
#define EAPO_WIDEN from_fp16
#else
#define EAPO_WIDEN from_bf16
#endif

namespace eapo {

using Kernel = Shape<EAPO_BLOCK_N, EAPO_BLOCK_V, EAPO_STAGES, EAPO_CLUSTER, EAPO_PINGPONG, EAPO_STAGGER>;

// Registers per thread after setmaxnreg: 128 * 40 + 256 * 232 = 64512 of the multiprocessor's 65536.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;

// Named barriers; 0 is __syncthreads.
constexpr int GROUP_BARRIER = 1;  // and 2: the warps of a consumer group
constexpr int TURN_BARRIER = 3;   // and 4: one consumer group gives the other its turn

// Shared memory: stages of operands | extra bytes (a multiple of 1024) | full barriers | empty barriers.
struct SharedMemory {
    u32 stages, extra, barriers;
    __device__ __forceinline__ u32 hidden(int stage) const { return stages + stage * Kernel::STAGE_BYTES; }
    __device__ __forceinline__ u32 weight(int stage) const { return hidden(stage) + Kernel::HIDDEN_BYTES; }
    __device__ __forceinline__ u32 full(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ u32 empty(int stage) const { return barriers + 8 * (Kernel::STAGES + stage); }
};

struct Producer {
    SharedMemory shared;
    const TensorMap *hidden, *weight;
    int rank;

    __device__ __forceinline__ void wait_empty(int stage, unsigned parity) { barrier_wait(shared.empty(stage), parity); }
    __device__ __forceinline__ void expect(int stage) { barrier_expect(shared.full(stage), Kernel::STAGE_BYTES); }
    __device__ __forceinline__ void load(int stage, int row_tile, int tile, int step) {
        const int row = (row_tile * Kernel::CLUSTER + rank) * Kernel::BLOCK_N;
        box_load(shared.hidden(stage), hidden, shared.full(stage), step * BLOCK_D, row);
        const int column = tile * Kernel::BLOCK_V + rank * (Kernel::BLOCK_V / Kernel::CLUSTER);
        const u32 to = shared.weight(stage) + rank * Kernel::WEIGHT_PART;
        if (Kernel::CLUSTER == 1) {
            box_load(to, weight, shared.full(stage), step * BLOCK_D, column);
        } else {
            box_load_to_all(to, weight, shared.full(stage), step * BLOCK_D, column, (1 << Kernel::CLUSTER) - 1);
        }
    }
};

// A consumer without an epilogue; the kernels derive from it.
struct Consumer {
    SharedMemory shared;
    const Arguments& arguments;
    int rank, group, thread;  // CTA of the cluster; warp group 0 or 1; thread 0 ... 127 of it
    float d[Kernel::M_BLOCKS][Kernel::FRAGMENT];

    __device__ __forceinline__ Consumer(const SharedMemory& shared, const Arguments& arguments, int rank, int group, int thread)
        : shared(shared), arguments(arguments), rank(rank), group(group), thread(thread) {}

    // First row of m64 block ``block`` of this group's part of a unit.
    __device__ __forceinline__ int first_row(const Unit& unit, int block) const {
        const int part = Kernel::PINGPONG ? 0 : group * Kernel::GROUP_ROWS;
        return (unit.row_tile * Kernel::CLUSTER + rank) * Kernel::BLOCK_N + part + block * MMA_ROWS;
    }
    __device__ __forceinline__ float scale(int row) const {
        return arguments.row_inv_temperature ? arguments.scale * arguments.row_inv_temperature[row] : arguments.scale;
    }
    __device__ __forceinline__ int target(int row) const {
        const i64 target = arguments.targets[row];
        return target >= 0 && target < arguments.n_columns ? int(target) : -1;
    }

    __device__ __forceinline__ void wait_full(int stage, unsigned parity) { barrier_wait(shared.full(stage), parity); }
    __device__ __forceinline__ void multiply(int stage, bool first) {
        const int part = Kernel::PINGPONG ? 0 : group * Kernel::GROUP_ROWS * SWIZZLE_BYTES;
        const u64 a = operand_descriptor(shared.hidden(stage) + part), b = operand_descriptor(shared.weight(stage));
        multiply_fence();
        EAPO_UNROLL
        for (int k = 0; k < BLOCK_D / MMA_DEPTH; ++k) {
            EAPO_UNROLL
            for (int block = 0; block < Kernel::M_BLOCKS; ++block) {
                const u64 down = block * (MMA_ROWS * SWIZZLE_BYTES >> 4);
                eapo::multiply<Kernel::BLOCK_V>(d[block], a + down + k * DESCRIPTOR_STEP, b + k * DESCRIPTOR_STEP, !(first && k == 0));
            }
        }
        multiply_commit();
    }
    template <int PENDING>
    __device__ __forceinline__ void wait_products() {
        multiply_wait<PENDING>();
        if (PENDING == 0) {
            EAPO_UNROLL
            for (int block = 0; block < Kernel::M_BLOCKS; ++block) pin(d[block]);
        }
    }
    // One arrival per warp: a wait for wgmma covers only the warp that executes it.
    __device__ __forceinline__ void release(int stage) {
        const int lane = thread % WARP;
        if (Kernel::CLUSTER == 1) {
            if (lane == 0) barrier_arrive(shared.empty(stage));
        } else if (lane < Kernel::CLUSTER) {
            barrier_arrive_at(shared.empty(stage), lane);
        }
    }
    __device__ __forceinline__ void await_turn() { named_sync(TURN_BARRIER + group, 2 * WARP_GROUP); }
    __device__ __forceinline__ void give_turn() { named_arrive(TURN_BARRIER + 1 - group, 2 * WARP_GROUP); }

    // Add the bias to m64 block ``block``; a bias of -inf gives LOWEST. Each lane loads an eighth of the column pairs of its row and
    // shares them by shuffles: one load per column would need too many registers at once.
    __device__ __forceinline__ void add_bias(int block, int first_column) {
#ifdef EAPO_BIAS
        constexpr int PAIRS = Kernel::FRAGMENT / 4 / 8;
        u32 pairs[PAIRS];
        EAPO_UNROLL
        for (int part = 0; part < PAIRS; ++part) {
            const int j = 8 * part + thread % WARP / 4;
            pairs[part] = bias_bits(first_column + fragment_column(thread, 4 * j))
                          | bias_bits(first_column + fragment_column(thread, 4 * j + 1)) << 16;
        }
        EAPO_UNROLL
        for (int j = 0; j < Kernel::FRAGMENT / 4; ++j) {
            const u32 pair = __shfl_sync(0xFFFFFFFF, pairs[j / 8], j % 8 * 4 + thread % 4);
            EAPO_UNROLL
            for (int c = 0; c < 2; ++c) {
                const float bias = EAPO_WIDEN(u16(c ? pair >> 16 : pair));
                float &upper = d[block][4 * j + c], &lower = d[block][4 * j + 2 + c];
                upper = at_least_lowest(upper + bias);
                lower = at_least_lowest(lower + bias);
            }
        }
#endif
    }
#ifdef EAPO_BIAS
    __device__ __forceinline__ u32 bias_bits(int column) const {
        const i64 inside = smaller(column, arguments.n_columns - 1);
        return static_cast<const u16*>(arguments.bias)[inside * arguments.bias_stride];
    }
#endif
};

// Initialise the barriers, run producer or consumer, end the cluster together. ``make`` builds the consumer.
template <class Make>
__device__ __forceinline__ void run(
    const TensorMap* hidden, const TensorMap* weight, const Arguments& arguments, int extra_bytes, Make make) {
    extern __shared__ unsigned char memory[];
    const u32 stages = (shared_address(memory) + 1023) & ~1023u;  // swizzled tiles start at multiples of 1024
    const u32 extra = stages + Kernel::STAGES * Kernel::STAGE_BYTES;
    const SharedMemory shared = {stages, extra, extra + u32(extra_bytes)};
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARP, 0);  // uniform in a warp, which the compiler now knows
    const int role = warp / (WARP_GROUP / WARP);
    const int rank = Kernel::CLUSTER == 1 ? 0 : int(cluster_rank());
    const int cluster = blockIdx.x / Kernel::CLUSTER, clusters = gridDim.x / Kernel::CLUSTER;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Kernel::STAGES; ++stage) {
            barrier_init(shared.full(stage), 1);
            barrier_init(shared.empty(stage), Kernel::EMPTY_ARRIVALS);
        }
        barrier_init_fence();
    }
    if (Kernel::CLUSTER == 1) {
        __syncthreads();
    } else {
        cluster_sync();
    }
    if (role == 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (warp == 0 && elected()) {
            map_prefetch(hidden);
            map_prefetch(weight);
            Producer producer = {shared, hidden, weight, rank};
            produce<Kernel>(producer, arguments.walk, arguments.steps, cluster, clusters);
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        auto consumer = make(shared, rank, role - 1, int(threadIdx.x % WARP_GROUP));
        consume<Kernel>(consumer, arguments.walk, arguments.steps, role - 1, cluster, clusters);
        consumer.finish();
    }
    // A peer may still send weights or arrivals to this CTA, so all CTAs of the cluster end together.
    if (Kernel::CLUSTER > 1) cluster_sync();
}

}  // namespace eapo
