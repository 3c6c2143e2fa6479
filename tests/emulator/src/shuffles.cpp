// Exchanges between the threads of a warp.
#include "lanes.h"

namespace ptx {

Step Machine::do_shfl(Warp& warp, const Instruction& in, u32 lanes) {
    const bool reports = in.operands.size() == 6;  // d | p
    const size_t from = reports ? 2 : 1;
    const u32 members = u32(read_one(warp, in.at(from + 3), __builtin_ctz(lanes))) & warp.live;
    if (members & ~lanes) return Step::STAY;
    u64 sa[LANES], sb[LANES], sc[LANES];
    const u64 *a = read(warp, in.at(from), sa), *b = read(warp, in.at(from + 1), sb), *c = read(warp, in.at(from + 2), sc);
    std::array<u64, LANES> out{};
    u32 found = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        const int clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31), by = int(b[lane] & 31);
        const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        int j = 0;
        bool inside = false;
        if (in.has("up")) j = lane - by, inside = j >= highest;
        else if (in.has("down")) j = lane + by, inside = j <= highest;
        else if (in.has("bfly")) j = lane ^ by, inside = j <= highest;
        else if (in.has("idx")) j = lowest | (by & ~segment), inside = j <= highest;
        else throw Fault("not emulated: " + in.mnemonic());
        if (!inside) j = lane;
        if (lanes >> lane & 1 && !(lanes >> j & 1)) throw Fault("shfl: expected a lane that takes part, got lane " + std::to_string(j));
        out[lane] = a[j] & 0xFFFFFFFF;
        found |= u32(inside) << lane;
    }
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = out[lane];
    if (reports) set_predicate(warp, in.at(1), found, lanes);
    return Step::NEXT;
}

Step Machine::do_vote(Warp& warp, const Instruction& in, u32 lanes) {
    const u32 members = u32(read_one(warp, in.at(in.operands.size() - 1), __builtin_ctz(lanes))) & warp.live;
    if (members & ~lanes) return Step::STAY;
    const u32 ballot = predicate(warp, in.at(1)) & members;
    if (in.has("ballot")) {
        u64* d = write(warp, in.at(0));
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) d[lane] = ballot;
        return Step::NEXT;
    }
    const bool holds = in.has("any") ? ballot != 0 : in.has("all") ? ballot == members : ballot == 0 || ballot == members;
    set_predicate(warp, in.at(0), holds ? ALL : 0, lanes);
    return Step::NEXT;
}

Step Machine::do_elect(Warp& warp, const Instruction& in, u32 lanes) {
    const u32 members = u32(read_one(warp, in.at(2), __builtin_ctz(lanes)));
    if (members & warp.live & ~lanes) return Step::STAY;
    const int leader = __builtin_ctz(lanes);
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = leader;
    set_predicate(warp, in.at(1), 1u << leader, lanes);
    return Step::NEXT;
}

Step Machine::do_redux(Warp& warp, const Instruction& in, u32 lanes) {
    const u32 members = u32(read_one(warp, in.at(2), __builtin_ctz(lanes))) & warp.live;
    if (members & ~lanes) return Step::STAY;
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        T total{};
        bool first = true;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(members >> lane & 1)) continue;
            const T value = as<T>(read_one(warp, in.at(1), lane));
            total = first ? value : combined<T>(in, total, value, T());
            first = false;
        }
        u64* d = write(warp, in.at(0));
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) d[lane] = bits_of(total);
        return Step::NEXT;
    });
}

}  // namespace ptx
