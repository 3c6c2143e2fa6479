// Loads, stores and atomics, and the resolution of addresses.
#include "lanes.h"

namespace ptx {

namespace {

u64 widened(const Type& type, const u8* from) {
    u64 value = 0;
    std::memcpy(&value, from, type.bytes());
    const int bits = type.bytes() * 8;
    if (type.letter == 's' && bits < 64 && value >> (bits - 1) & 1) value |= ~0ull << bits;
    return value;
}

bool in_shared(const Instruction& in) { return in.has("shared") || in.has("shared::cta") || in.has("shared::cluster"); }

}  // namespace

std::pair<Cta*, u32> Machine::locate(Warp& warp, u32 address) {
    const u32 rank = address >> RANK_SHIFT, offset = address & ((1u << RANK_SHIFT) - 1);
    if (rank == 0) return {warp.cta, offset};
    if (rank > ctas_.size()) throw Fault("shared memory: expected a program of the cluster, got rank " + std::to_string(rank - 1));
    Cta* cta = ctas_[rank - 1].get();
    if (cta->exited()) throw Fault("shared memory: expected a program that still runs, got one that has left");
    return {cta, offset};
}

// The offset of an address in the program's own shared memory: ``shared::cta``, of which ``shared`` is short.
u32 Machine::own(Warp& warp, const Instruction& in, u32 address) {
    const auto [cta, offset] = locate(warp, address);
    if (cta != warp.cta) throw Fault("shared memory: expected the program's own in " + in.mnemonic() + ", got another's");
    return offset;
}

u8* Machine::generic(Warp& warp, const Instruction& in, u64 address, u32 size, bool write, int lane) {
    if (address % size) throw Fault("expected an address aligned to " + std::to_string(size) + " bytes, got " + std::to_string(address));
    const bool window = address >= WINDOW && address < WINDOW + (1ull << 32);
    if (in_shared(in) || window) {
        if (in_shared(in) && !in.has("shared::cluster")) own(warp, in, u32(address));
        auto [cta, offset] = locate(warp, u32(address));
        return write ? cta->shared.write(offset, size, warp.thread(lane)) : cta->shared.read(offset, size);
    }
    if (in.has("param")) {
        const u64 start = u64(reinterpret_cast<uintptr_t>(launch_.parameters.data()));
        if (address < start || address + size > start + launch_.parameters.size() || write) throw Fault("expected a read of a parameter");
        return reinterpret_cast<u8*>(address);
    }
    for (const char* other : {"local", "const"})
        if (in.has(other)) throw Fault(std::string(other) + " memory is not emulated");
    return static_cast<u8*>(global_.at(address, size, write));
}

Step Machine::do_ld(Warp& warp, const Instruction& in, u32 lanes) {
    const int n = in.vector, item = in.type().bytes();
    const size_t at = address_of(in);
    if (int(at) != n) throw Fault("expected as many registers as numbers in " + in.mnemonic());
    std::array<u64*, 8> to;
    for (int i = 0; i < n; ++i) to[i] = write(warp, in.at(i));
    std::vector<std::array<u64, LANES>> values(n);
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const u8* from = generic(warp, in, read_one(warp, in.at(at), lane), item * n, false, lane);
        for (int i = 0; i < n; ++i) values[i][lane] = widened(in.type(), from + i * item);
    }
    for (int i = 0; i < n; ++i)
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) to[i][lane] = values[i][lane];
    return Step::NEXT;
}

Step Machine::do_st(Warp& warp, const Instruction& in, u32 lanes) {
    const int n = in.vector, item = in.type().bytes();
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        u8* to = generic(warp, in, read_one(warp, in.at(0), lane), item * n, true, lane);
        for (int i = 0; i < n; ++i) {
            const u64 value = read_one(warp, in.at(1 + i), lane);
            std::memcpy(to + i * item, &value, item);
        }
    }
    return Step::NEXT;
}

Step Machine::do_atom(Warp& warp, const Instruction& in, u32 lanes) {
    const size_t at = address_of(in);
    u64* to = at > 0 ? write(warp, in.at(0)) : nullptr;
    const bool three = in.has("cas");
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        u8* place = generic(warp, in, read_one(warp, in.at(at), lane), in.type().bytes(), true, lane);
        const u64 b = read_one(warp, in.at(at + 1), lane), c = three ? read_one(warp, in.at(at + 2), lane) : 0;
        u64 old = 0;
        by_type(in, [&](auto zero) {
            using T = decltype(zero);
            T value;
            std::memcpy(&value, place, sizeof value);
            old = bits_of(value);
            value = combined(in, value, as<T>(b), as<T>(c));
            std::memcpy(place, &value, sizeof value);
            return Step::NEXT;
        });
        if (to) to[lane] = old;
    }
    return Step::NEXT;
}

Step Machine::do_red(Warp& warp, const Instruction& in, u32 lanes) { return do_atom(warp, in, lanes); }

}  // namespace ptx
