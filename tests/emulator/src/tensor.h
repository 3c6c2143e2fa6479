// Addresses of TMA boxes and wgmma operands.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"

namespace ptx {

// Replaces the 128 opaque bytes of a CUtensorMap; ptx_machine.py writes it.
struct TensorMap {
    static constexpr u32 MAGIC = 0x70617465;
    u32 magic;
    i32 rank, item, swizzle;  // bytes of a number; 0, 32, 64 or 128 bytes of swizzle
    u64 base;
    u64 size[5], stride[5];  // numbers and bytes, from the innermost dimension; stride[0] is the item's
    u32 box[5];
    u32 unused;
};
static_assert(sizeof(TensorMap) == 128 || sizeof(TensorMap) < 136, "as large as CUtensorMap");

// The pattern repeats every 8 rows of ``swizzle`` bytes and depends on absolute addresses.
inline u32 swizzled(u32 address, int swizzle) {
    switch (swizzle) {
        case 32: return address ^ (address >> 7 & 1) << 4;
        case 64: return address ^ (address >> 7 & 3) << 4;
        case 128: return address ^ (address >> 7 & 7) << 4;
        default: return address;
    }
}

// Calls ``visit(shared address, global address, bytes, inside)`` for every 16-byte piece (or smaller row) of a box at ``origin``.
template <class Visit>
void walk_box(const TensorMap& map, u32 shared, const i64* origin, Visit visit) {
    const u32 row_bytes = map.box[0] * map.item;
    if (map.swizzle && row_bytes > u32(map.swizzle)) throw Fault("TMA: expected box rows within the swizzle's span");
    if (row_bytes % 16) throw Fault("TMA: expected box rows of a multiple of 16 bytes, got " + std::to_string(row_bytes));
    u64 rows = 1;
    for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
    for (u64 row = 0; row < rows; ++row) {
        u64 rest = row, address = map.base;
        bool inside = true;
        for (int i = 1; i < map.rank; ++i) {
            const i64 at = origin[i] + i64(rest % map.box[i]);
            rest /= map.box[i];
            inside = inside && at >= 0 && u64(at) < map.size[i];
            address += u64(at) * map.stride[i];
        }
        for (u32 piece = 0; piece < row_bytes; piece += 16) {
            const i64 column = origin[0] + piece / map.item;
            const i64 left = std::min<i64>(16 / map.item, i64(map.size[0]) - column);
            if (column < 0) throw Fault("TMA: a negative innermost coordinate is not emulated");
            const u32 bytes = inside && left > 0 ? u32(left) * map.item : 0;
            visit(swizzled(shared + u32(row) * row_bytes + piece, map.swizzle), address + u64(column) * map.item, bytes);
        }
    }
}

inline const TensorMap& tensor_map(u64 address) {
    const auto& map = *reinterpret_cast<const TensorMap*>(address);
    if (map.magic != TensorMap::MAGIC) throw Fault("TMA: expected the address of a descriptor among the parameters");
    return map;
}

inline void check_box(const TensorMap& map, u32 shared, int rank) {
    if (map.rank != rank) throw Fault("TMA: expected a descriptor of rank " + std::to_string(rank));
    const u32 alignment = map.swizzle ? u32(map.swizzle) * 8 : 128;
    if (shared % 128 || (map.swizzle && shared % alignment))
        throw Fault("TMA: expected a shared address that is a multiple of " + std::to_string(alignment));
}

// A wgmma operand in shared memory, K-major: rows of ``rows`` numbers along K, 8 at a time.
struct SharedOperand {
    u32 start, leading, between;
    int swizzle;
    explicit SharedOperand(u64 descriptor) {
        start = u32(descriptor & 0x3FFF) << 4;
        leading = u32(descriptor >> 16 & 0x3FFF) << 4;
        between = u32(descriptor >> 32 & 0x3FFF) << 4;
        const int kinds[] = {0, 128, 64, 32};
        swizzle = kinds[descriptor >> 62];
        if (descriptor >> 49 & 7) throw Fault("wgmma: a base offset in the descriptor is not emulated");
    }
    // Address of byte ``k`` (a multiple of 16) of row ``row``.
    u32 address(int row, int k) const {
        if (swizzle == 0) return start + row / 8 * between + row % 8 * 16 + k / 16 * leading;
        return swizzled(start + row / 8 * between + row % 8 * u32(swizzle) + k, swizzle);
    }
};

}  // namespace ptx
