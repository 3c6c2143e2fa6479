// Layouts as functions of integers: accumulator fragments, the 128-byte swizzle of shared memory, wgmma operand descriptors, and the order
// of tiles. Tested on the host against the formulas of the PTX manual.
#pragma once

#include "portable.h"

namespace eapo {

constexpr int WARP = 32;
constexpr int WARP_GROUP = 128;
constexpr int BLOCK_D = 64;                          // depth of a step: 64 half-precision numbers fill the 128-byte swizzle
constexpr int SWIZZLE_BYTES = 128;
constexpr int SWIZZLE_ROWS = 8;                      // the pattern repeats every 8 rows
constexpr int MMA_ROWS = 64;                         // rows of one wgmma
constexpr int MMA_DEPTH = 16;                        // depth of one wgmma
constexpr int ITEM = 2;                              // bytes of an operand's element

// wgmma m64nNk16, fp32 accumulator: the element in register i of thread ``thread`` (0 ... 127 of its warp group).
EAPO_SHARED int fragment_row(int thread, int i) { return thread / WARP * 16 + thread % WARP / 4 + i / 2 % 2 * 8; }
EAPO_SHARED int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Byte of 16-byte chunk ``chunk`` (0 ... 7) of row ``row`` in a tile with rows of 128 bytes, as TMA's SWIZZLE_128B places it.
// The tile starts at a multiple of 1024 bytes.
EAPO_SHARED int swizzled(int row, int chunk) { return row * SWIZZLE_BYTES + ((chunk ^ row % SWIZZLE_ROWS) << 4); }

// stmatrix.x4 of fragments j and j + 1: the row and the 16-byte chunk that lane ``lane`` addresses.
EAPO_SHARED int stored_row(int warp, int lane) { return warp * 16 + lane / 8 % 2 * 8 + lane % 8; }
EAPO_SHARED int stored_chunk(int j, int lane) { return j + lane / 16; }

// Operand descriptor of wgmma for a K-major tile with the 128-byte swizzle, at a shared-memory address. Bits 0-13: address / 16;
// 16-29: leading offset, ignored for this layout; 32-45: offset between groups of 8 rows / 16; 62-63: 1 = 128-byte swizzle.
EAPO_SHARED unsigned long long operand_descriptor(unsigned address) {
    const unsigned long long start = (address & 0x3FFFF) >> 4;
    const unsigned long long between = SWIZZLE_ROWS * SWIZZLE_BYTES >> 4;
    return start | 1ull << 16 | between << 32 | 1ull << 62;
}

// A step of MMA_DEPTH along a row is 32 bytes. The hardware swizzles the address, so only the start address moves.
constexpr unsigned long long DESCRIPTOR_STEP = MMA_DEPTH * ITEM >> 4;

// Work of a cluster: one row tile per CTA, vocabulary tiles [first, end).
struct Unit {
    int row_tile, split, first, end;
};

// How [row tiles] x [column tiles] is cut into units, and their order. A row tile here is a cluster's: one tile per CTA.
struct Walk {
    int row_tiles, column_tiles, tiles_per_split, group;

    EAPO_SHARED int splits() const { return ceil_div(column_tiles, tiles_per_split); }
    EAPO_SHARED int units() const { return row_tiles * splits(); }

    // ``group`` row tiles sweep the vocabulary together, so that their hidden states and the weight tiles in flight stay in L2. Every
    // other group sweeps backwards and starts with weights that are still in L2.
    EAPO_SHARED Unit unit(int index) const {
        const int per_group = group * splits();
        const int number = index / per_group, inside = index % per_group;
        const int size = smaller(row_tiles - number * group, group);
        const int place = inside / size;
        const int split = number % 2 ? splits() - 1 - place : place;
        const int first = split * tiles_per_split;
        return {number * group + inside % size, split, first, smaller(first + tiles_per_split, column_tiles)};
    }
};

}  // namespace eapo
