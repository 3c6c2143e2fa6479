// The kernels' headers compiled for the host, with C entry points for the tests (host_library.py loads them).
#include <cstddef>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "epilogue.h"
#include "explore.h"

using namespace eapo;

extern "C" {

void fragment(int thread, int i, int* row, int* column) { *row = fragment_row(thread, i), *column = fragment_column(thread, i); }
int swizzled_byte(int row, int chunk) { return swizzled(row, chunk); }
unsigned long long descriptor(unsigned address) { return operand_descriptor(address); }

void walk_unit(int row_tiles, int column_tiles, int tiles_per_split, int group, int index, int* out) {
    const Unit unit = Walk{row_tiles, column_tiles, tiles_per_split, group}.unit(index);
    out[0] = unit.row_tile, out[1] = unit.split, out[2] = unit.first, out[3] = unit.end;
}
int walk_units(int row_tiles, int column_tiles, int tiles_per_split, int group) {
    return Walk{row_tiles, column_tiles, tiles_per_split, group}.units();
}

int arguments_layout(int field) {
    const std::size_t at[] = {
        offsetof(Arguments, sums), offsetof(Arguments, targets), offsetof(Arguments, bias),
        offsetof(Arguments, row_inv_temperature), offsetof(Arguments, offsets), offsetof(Arguments, bias_stride),
        offsetof(Arguments, scale), offsetof(Arguments, n_rows), offsetof(Arguments, n_columns), offsetof(Arguments, steps),
        offsetof(Arguments, walk) + offsetof(Walk, row_tiles), offsetof(Arguments, walk) + offsetof(Walk, column_tiles),
        offsetof(Arguments, walk) + offsetof(Walk, tiles_per_split), offsetof(Arguments, walk) + offsetof(Walk, group),
        sizeof(Arguments)};
    return int(at[field]);
}

// ---- the protocol ----
}

template <class S>
static const char* search(const eapo::Walk& walk, int steps, int fault, int limit, long long* states) {
    static std::string message;
    explore::Model<S> model;
    model.run(walk, steps, explore::Fault(fault), limit);
    *states = model.states;
    message = model.error;
    return message.c_str();
}

extern "C" const char* interleavings(int shape, int row_tiles, int column_tiles, int per_split, int steps, int fault, int limit,
                                     long long* states) {
    static constexpr decltype(&search<Shape<128, 256, 2, 1, false, 0>>) SEARCHES[] = {
        // block_n, block_v, stages, cluster, pingpong, stagger: test_protocol.py names them
        search<Shape<128, 256, 2, 1, false, 0>>, search<Shape<128, 256, 3, 1, false, 2>>, search<Shape<128, 256, 2, 2, false, 1>>,
        search<Shape<128, 128, 2, 2, true, 0>>,  search<Shape<128, 128, 3, 1, true, 0>>,  search<Shape<128, 256, 2, 1, false, 1>>,
        search<Shape<128, 256, 4, 1, false, 3>>};
    return SEARCHES[shape]({row_tiles, column_tiles, per_split, 2}, steps, fault, limit, states);
}

// ---- the epilogues, run for all 128 threads of a warp group on a matrix of raw logits [64, stride] ----

template <int BLOCK_V, bool ENTROPY, bool MOMENTS>
static void statistics(const float* raw, int stride, int n_columns, const float* scale, const int* targets, const float* bias,
                       int first_tile, int end_tile, int tile_step, float* out) {
    using Sums = RunningSums<ENTROPY, MOMENTS>;
    constexpr int FRAGMENT = BLOCK_V / 2;
    std::vector<Sums> sums(2 * WARP_GROUP);
    std::vector<float> y_target(2 * WARP_GROUP, 0.0f);
    for (int tile = first_tile; tile < end_tile; tile += tile_step) {
        for (int thread = 0; thread < WARP_GROUP; ++thread) {
            float d[FRAGMENT];
            for (int i = 0; i < FRAGMENT; ++i) {
                const int row = fragment_row(thread, i), column = tile * BLOCK_V + fragment_column(thread, i);
                d[i] = column < n_columns ? raw[std::size_t(row) * stride + column] : 0.0f;  // as TMA fills
                if (bias) d[i] = at_least_lowest(d[i] + bias[column < n_columns ? column : n_columns - 1]);
            }
            for (int half = 0; half < 2; ++half) {
                const int row = fragment_row(thread, 2 * half), at = 2 * thread + half;
                mask_columns<FRAGMENT>(d, half, thread, targets[row], tile * BLOCK_V, n_columns, y_target[at]);
                online_softmax_update<FRAGMENT>(d, half, scale[row] * LOG2E, sums[at]);
            }
        }
    }
    for (int distance = 1; distance < 4; distance *= 2) {
        const std::vector<Sums> old = sums;
        const std::vector<float> old_target = y_target;
        for (int at = 0; at < 2 * WARP_GROUP; ++at) {
            const int other = at ^ 2 * distance;
            sums[at].merge(old[other], scale[fragment_row(at / 2, at % 2 * 2)] * LOG2E);
            y_target[at] += old_target[other];
        }
    }
    for (int thread = 0; thread < WARP_GROUP; thread += 4) {
        for (int half = 0; half < 2; ++half) {
            const int row = fragment_row(thread, 2 * half), at = 2 * thread + half;
            const RangeSums r = sums[at].close(y_target[at], scale[row]);
            const float values[7] = {r.row_max, r.z_target, r.rest, r.x_exp, r.exp2, r.x_exp2, r.xx_exp};
            for (int field = 0; field < 7; ++field) out[field * MMA_ROWS + row] = values[field];
        }
    }
}

extern "C" void range_sums(int block_v, int kind, const float* raw, int stride, int n_columns, const float* scale, const int* targets,
                           const float* bias, int first_tile, int end_tile, int tile_step, float* out) {
    const auto call = [&](auto function) {
        function(raw, stride, n_columns, scale, targets, bias, first_tile, end_tile, tile_step, out);
    };
    if (block_v == 256) {
        call(kind == 0 ? statistics<256, false, false> : kind == 1 ? statistics<256, true, false> : statistics<256, true, true>);
    } else {
        call(kind == 0 ? statistics<128, false, false> : kind == 1 ? statistics<128, true, false> : statistics<128, true, true>);
    }
}

// One tile of 64 x BLOCK_V: E at its place in each slice of shared memory, in units of half-precision elements, and the sums of each row.
template <int BLOCK_V>
static void exponentials(const float* raw, int stride, int n_columns, const float* scale, const float* offset, const int* targets,
                         int tile, float* slices, float* rest, float* x_exp) {
    constexpr int FRAGMENT = BLOCK_V / 2, FRAGMENTS = 8;
    std::vector<float> d(WARP_GROUP * FRAGMENT);
    std::memset(rest, 0, 64 * sizeof(float));
    std::memset(x_exp, 0, 64 * sizeof(float));
    for (int thread = 0; thread < WARP_GROUP; ++thread) {
        float* mine = &d[thread * FRAGMENT];
        for (int i = 0; i < FRAGMENT; ++i) {
            const int column = tile * BLOCK_V + fragment_column(thread, i);
            mine[i] = column < n_columns ? raw[std::size_t(fragment_row(thread, i)) * stride + column] : 0.0f;
        }
        for (int half = 0; half < 2; ++half) {
            const int row = fragment_row(thread, 2 * half);
            float unused = 0.0f;
            mask_columns<FRAGMENT>(mine, half, thread, targets[row], tile * BLOCK_V, n_columns, unused);
            RunningSums<true, false> sums;
            for (int j = 0; j < FRAGMENT / 4; j += 2 * FRAGMENTS) {
                RunningSums<true, false> part;
                exponentiate<2 * FRAGMENTS>(mine, j, half, scale[row] * LOG2E, offset[row], part);
                sums.add(part);
            }
            rest[row] += sums.rest;
            x_exp[row] += sums.x_exp;
        }
    }
    // stmatrix.x4: lane 8 m + r addresses row r of matrix m; register m of lane t holds (t / 4, 2 (t % 4) ...) of matrix m.
    for (int slice = 0; slice < BLOCK_V / 64; ++slice) {
        for (int j = 0; j < FRAGMENTS; j += 2) {
            for (int at = 0; at < 4 * 4 * WARP; ++at) {
                const int warp = at / (4 * WARP), m = at / WARP % 4, lane = at % WARP, pointer = 8 * m + lane / 4;
                const int to = swizzled(stored_row(warp, pointer), stored_chunk(j, pointer)) / ITEM + 2 * (lane % 4);
                const float* f = &d[(warp * WARP + lane) * FRAGMENT] + 4 * (8 * slice + j) + 2 * m;
                for (int c = 0; c < 2; ++c) slices[slice * 4096 + to + c] = f[c];
            }
        }
    }
}

extern "C" void exp_tile(int block_v, const float* raw, int stride, int n_columns, const float* scale, const float* offset,
                         const int* targets, int tile, float* slices, float* rest, float* x_exp) {
    const auto run = block_v == 256 ? exponentials<256> : exponentials<128>;
    run(raw, stride, n_columns, scale, offset, targets, tile, slices, rest, x_exp);
}
