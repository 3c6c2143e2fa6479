// Instructions through which threads meet: memory, shuffles, barriers, copies, tensor cores.
#include "lanes.h"

namespace ptx {

namespace {

constexpr u64 WINDOW = 0x7F0000000000ull << 8;  // generic addresses of shared memory, see do_cvta
constexpr u32 RANK_SHIFT = 24;                  // shared::cluster: (rank + 1) above the offset; 0 is the own program

u64 widened(const Type& type, const u8* from) {
    u64 value = 0;
    std::memcpy(&value, from, type.bytes());
    const int bits = type.bytes() * 8;
    if (type.letter == 's' && bits < 64 && value >> (bits - 1) & 1) value |= ~0ull << bits;
    return value;
}

bool in_shared(const Instruction& in) { return in.has("shared") || in.has("shared::cta") || in.has("shared::cluster"); }

size_t address_of(const Instruction& in) {
    for (size_t i = 0; i < in.operands.size(); ++i)
        if (in.operands[i].kind == Kind::ADDRESS || in.operands[i].kind == Kind::PARAMETER) return i;
    throw Fault("expected an address in " + in.mnemonic());
}

}  // namespace

// Memory --------------------------------------------------------------------------------------------------------------------------

std::pair<Cta*, u32> Machine::locate(Warp& warp, u32 address) {
    const u32 rank = address >> RANK_SHIFT, offset = address & ((1u << RANK_SHIFT) - 1);
    if (rank == 0) return {warp.cta, offset};
    if (rank > ctas_.size()) throw Fault("shared memory: expected a program of the cluster, got rank " + std::to_string(rank - 1));
    Cta* cta = ctas_[rank - 1].get();
    if (cta->exited()) throw Fault("shared memory: expected a program that still runs, got one that has left");
    return {cta, offset};
}

// The offset of an address that must not be a peer's: ``shared::cta``, which is also what ``shared`` means.
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
        return write ? cta->shared.write(offset, size, warp.thread(lane)) : cta->shared.read(offset, size, false);
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

namespace {
template <class T>
T combined(const Instruction& in, T old, T b, T c) {
    if (in.has("exch")) return b;
    if (in.has("cas")) return old == b ? c : old;
    if constexpr (std::is_floating_point_v<T>) {
        if (in.has("NaN") || in.has("abs")) throw Fault("not emulated: " + in.mnemonic());
        if (in.has("min")) return std::fmin(old, b);
        if (in.has("max")) return std::fmax(old, b);
        if (in.has("add")) return old + b;
    } else {
        if (in.has("min")) return std::min(old, b);
        if (in.has("max")) return std::max(old, b);
        if (in.has("add")) return T(u64(old) + u64(b));
        if (in.has("and")) return T(old & b);
        if (in.has("or")) return T(old | b);
        if (in.has("xor")) return T(old ^ b);
    }
    throw Fault("not emulated: " + in.mnemonic());
}
}  // namespace

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

// Within a warp -------------------------------------------------------------------------------------------------------------------

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
    const bool truth = in.has("any") ? ballot != 0 : in.has("all") ? ballot == members : ballot == 0 || ballot == members;
    set_predicate(warp, in.at(0), truth ? ALL : 0, lanes);
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

// Barriers ------------------------------------------------------------------------------------------------------------------------

Step Machine::do_bar(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.has("warp")) {
        const u32 members = u32(read_one(warp, in.at(0), __builtin_ctz(lanes))) & warp.live;
        return members & ~lanes ? Step::STAY : Step::NEXT;
    }
    const int id = int(read_one(warp, in.at(0), __builtin_ctz(lanes)));
    const int expected = in.operands.size() > 1 ? int(read_one(warp, in.at(1), __builtin_ctz(lanes))) : threads();
    if (id < 0 || id > 15 || expected % LANES) throw Fault("bar: expected a barrier 0 to 15 and whole warps");
    NamedBarrier& barrier = warp.cta->named[id];
    if (warp.named == id) {  // has arrived before
        if (barrier.generation == warp.named_generation) return Step::STAY;
        warp.named = -1;
        return Step::NEXT;
    }
    if (!in.has("sync") && !in.has("arrive")) throw Fault("not emulated: " + in.mnemonic());
    if (barrier.arrived == 0) barrier.expected = expected;
    if (barrier.expected != expected) throw Fault("bar: expected all warps to name the same number of threads");
    ++counts.barriers;
    ++events_;
    const u64 generation = barrier.generation;
    barrier.arrived += LANES;
    if (barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return Step::NEXT;
    }
    if (in.has("arrive")) return Step::NEXT;
    warp.named = id;
    warp.named_generation = generation;
    return Step::STAY;
}

Step Machine::do_barrier(Warp& warp, const Instruction& in, u32 lanes) {
    if (!in.has("cluster")) return do_bar(warp, in, lanes);
    if (in.has("arrive")) {
        int live = 0;
        for (const auto& cta : ctas_)
            for (const auto& one : cta->warps) live += __builtin_popcount(one->live);
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) warp.cluster_generation[lane] = cluster_barrier_.generation;
        cluster_barrier_.arrived += __builtin_popcount(lanes);
        ++counts.barriers;
        ++events_;
        if (cluster_barrier_.arrived == live) {
            cluster_barrier_.arrived = 0;
            ++cluster_barrier_.generation;
        }
        return Step::NEXT;
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1 && warp.cluster_generation[lane] == cluster_barrier_.generation) return Step::STAY;
    return Step::NEXT;
}

Barrier& Machine::barrier(Cta& cta, u32 address) {
    auto found = cta.barriers.find(address);
    if (found == cta.barriers.end()) throw Fault("mbarrier: expected an initialised barrier, got none at " + std::to_string(address));
    return found->second;
}

// Triton's kernels, which have no clusters, do without the fence.
Barrier& Machine::known_to_others(Barrier& barrier) const {
    if (launch_.cluster > 1 && barrier.unfenced_by >= 0)
        throw Fault("mbarrier: expected fence.mbarrier_init after thread " + std::to_string(barrier.unfenced_by) +
                    " had initialised it, before another program or a copy arrives");
    if (launch_.cluster > 1 && barrier.made_in == cluster_barrier_.generation)
        throw Fault("mbarrier: expected a cluster barrier between its initialisation and the first arrival from elsewhere");
    return barrier;
}

void Machine::settle(Barrier& barrier) {
    if (std::abs(barrier.bytes) >= 1 << 20)
        throw Fault("mbarrier: expected fewer than 2^20 bytes on their way, got " + std::to_string(barrier.bytes));
    if (barrier.pending == 0 && barrier.bytes == 0) {
        ++barrier.phase;
        barrier.pending = barrier.expected;
    }
    ++events_;
}

void Machine::arrive(Cta& cta, u32 address, i64 arrivals, i64 bytes) {
    Barrier& b = barrier(cta, address);
    b.bytes += bytes;
    if (arrivals > b.pending)
        throw Fault("mbarrier: expected at most " + std::to_string(b.expected) + " arrivals a phase, got one more");
    b.pending -= arrivals;
    settle(b);
}

void Machine::complete(Cta& cta, u32 address, i64 bytes) {
    Barrier& b = known_to_others(barrier(cta, address));
    b.bytes -= bytes;
    settle(b);
}

Step Machine::do_mbarrier(Warp& warp, const Instruction& in, u32 lanes) {
    const size_t at = address_of(in);
    const auto value = [&](int lane, i64 otherwise) {
        return at + 1 < in.operands.size() ? i64(u32(read_one(warp, in.at(at + 1), lane))) : otherwise;
    };
    ++counts.barriers;
    if (in.has("try_wait") || in.has("test_wait")) {
        if (!in.has("parity")) throw Fault("not emulated: " + in.mnemonic());
        u32 done = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const u32 address = own(warp, in, u32(read_one(warp, in.at(at), lane)));
            if ((barrier(*warp.cta, address).phase & 1) != u64(value(lane, 0) & 1)) done |= 1u << lane;
        }
        if (done == 0 && in.has("try_wait")) return Step::STAY;
        set_predicate(warp, in.at(0), done, lanes);
        return Step::NEXT;
    }
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        if (!in.has("shared::cluster")) own(warp, in, u32(read_one(warp, in.at(at), lane)));
        auto [cta, address] = locate(warp, u32(read_one(warp, in.at(at), lane)));
        if (cta != warp.cta) known_to_others(barrier(*cta, address));
        if (in.has("init")) {
            if (address % 8) throw Fault("mbarrier: expected an address that is a multiple of 8");
            if (value(lane, 1) < 1 || value(lane, 1) >= 1 << 20) throw Fault("mbarrier: expected 1 to 2^20 - 1 arrivals");
            cta->shared.write(address, 8, warp.thread(lane));
            cta->shared.fence(warp.thread(lane));
            const i64 expected = value(lane, 1);
            cta->barriers[address] = {expected, expected, 0, 0, cluster_barrier_.generation, warp.thread(lane)};
        } else if (in.has("inval")) {
            barrier(*cta, address);
            cta->barriers.erase(address);
        } else if (in.has("arrive")) {
            if (in.has("noComplete")) throw Fault("not emulated: " + in.mnemonic());
            if (in.has("expect_tx")) arrive(*cta, address, 1, value(lane, 0));
            else arrive(*cta, address, value(lane, 1), 0);
        } else if (in.has("expect_tx")) {
            arrive(*cta, address, 0, value(lane, 0));
        } else if (in.has("complete_tx")) {
            complete(*cta, address, value(lane, 0));
        } else {
            throw Fault("not emulated: " + in.mnemonic());
        }
    }
    return Step::NEXT;
}

Step Machine::do_mapa(Warp& warp, const Instruction& in, u32 lanes) {
    return binary<u32>(warp, in, lanes, [&](u32 address, u32 rank) {
        if (int(rank) >= launch_.cluster) throw Fault("mapa: expected a rank of the cluster, got " + std::to_string(rank));
        return (address & ((1u << RANK_SHIFT) - 1)) | (rank + 1) << RANK_SHIFT;
    });
}

Step Machine::do_fence(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.has("proxy") && (in.has("async") || in.has("async::generic"))) {
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) warp.cta->shared.fence(warp.thread(lane));
    } else if (!in.has("mbarrier_init")) {
        return Step::NEXT;
    }
    for (auto& [address, barrier] : warp.cta->barriers)
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1 && barrier.unfenced_by == warp.thread(lane)) barrier.unfenced_by = -1;
    return Step::NEXT;
}

// Copies --------------------------------------------------------------------------------------------------------------------------

void Machine::later(Asynchronous operation) {
    if (std::uniform_real_distribution<>()(random_) >= launch_.lateness) {
        operation.run();
        ++events_;
    } else {
        pending_.push_back(std::move(operation));
    }
}

const TensorMap& Machine::descriptor(u64 address) const {
    const u64 parameters = u64(reinterpret_cast<uintptr_t>(launch_.parameters.data()));
    const bool one = address >= parameters && address < parameters + launch_.parameters.size();
    if ((one ? address - parameters : address) % 64) throw Fault("TMA: expected a descriptor at a multiple of 64 bytes");
    return tensor_map(address);
}

void Machine::load_box(Cta* cta, u32 to, const TensorMap& map, std::array<i64, 5> origin, u32 barrier_at) {
    ++counts.loads;
    later({[this, cta, to, &map, origin, barrier_at] {
        if (cta->exited()) throw Fault("TMA: expected a program that still runs, got a copy into one that has left");
        i64 bytes = 0;
        walk_box(map, to, origin.data(), [&](u32 shared, u64 global, u32 inside) {
            u8* piece = cta->shared.write(shared, 16, -1);
            std::memset(piece, 0, 16);
            if (inside) std::memcpy(piece, global_.at(global, inside, false), inside);
            bytes += 16;
        });
        complete(*cta, barrier_at, bytes);
    }});
}

Step Machine::do_cp(Warp& warp, const Instruction& in, u32 lanes) {
    if (!in.has("async")) throw Fault("not emulated: " + in.mnemonic());
    const bool bulk = in.has("bulk");
    if (in.has("commit_group")) {
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) ++(bulk ? warp.store_group : warp.copy_group)[lane];
        return Step::NEXT;
    }
    if (in.has("wait_group") || in.has("wait_all")) {
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const int kept = in.has("wait_all") ? 0 : int(read_one(warp, in.at(0), lane));
            if (bulk) {
                for (const auto& one : pending_)
                    if (one.warp == &warp && one.lane == lane && one.group < warp.store_group[lane] - kept) return Step::STAY;
            } else {
                auto& queue = warp.copies[lane];
                while (!queue.empty() && queue.front().group < warp.copy_group[lane] - kept + in.has("wait_all")) finish_copy(warp, lane);
            }
        }
        return Step::NEXT;
    }
    if (!bulk) {  // [shared], [global], bytes {, valid bytes}
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const u32 bytes = u32(read_one(warp, in.at(2), lane));
            const u32 valid = in.operands.size() > 3 && !in.has("L2::cache_hint") ? u32(read_one(warp, in.at(3), lane)) : bytes;
            warp.copies[lane].push_back({u32(read_one(warp, in.at(0), lane)), read_one(warp, in.at(1), lane), bytes,
                                         std::min(valid, bytes), warp.thread(lane), warp.copy_group[lane]});
            if (launch_.lateness == 0.0) finish_copy(warp, lane);
        }
        return Step::NEXT;
    }
    if (!in.has("tensor")) throw Fault("not emulated: " + in.mnemonic());
    int rank = 0;
    for (const auto& word : in.order)
        if (word.size() == 2 && word[1] == 'd') rank = word[0] - '0';
    const bool load = in.order.at(4) == "shared::cluster" || in.order.at(4) == "shared::cta";
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        std::array<i64, 5> origin{};
        if (load) {  // [to], [map, {coordinates}], [barrier] {, ranks}
            const auto [own, to] = locate(warp, u32(read_one(warp, in.at(0), lane)));
            const TensorMap& map = descriptor(read_one(warp, in.at(1), lane));
            check_box(map, to, rank);
            for (int i = 0; i < rank; ++i) origin[i] = i32(read_one(warp, in.at(2 + i), lane));
            const auto [owner, barrier_at] = locate(warp, u32(read_one(warp, in.at(2 + rank), lane)));
            if (own != owner) throw Fault("TMA: expected data and barrier in the same program");
            if (in.has("multicast::cluster")) {
                const u32 ranks = u32(read_one(warp, in.at(3 + rank), lane)) & 0xFFFF;
                for (size_t i = 0; i < 16; ++i) {
                    if (!(ranks >> i & 1)) continue;
                    if (i >= ctas_.size()) throw Fault("TMA: expected ranks of the cluster, got " + std::to_string(i));
                    load_box(ctas_[i].get(), to, map, origin, barrier_at);
                }
            } else {
                load_box(own, to, map, origin, barrier_at);
            }
        } else {  // [map, {coordinates}], [from]
            const TensorMap& map = descriptor(read_one(warp, in.at(0), lane));
            for (int i = 0; i < rank; ++i) origin[i] = i32(read_one(warp, in.at(1 + i), lane));
            const u32 from = own(warp, in, u32(read_one(warp, in.at(1 + rank), lane)));
            check_box(map, from, rank);
            ++counts.stores;
            Cta* owner = warp.cta;
            walk_box(map, from, origin.data(), [&](u32 shared, u64, u32) { owner->shared.reserve(shared, 16, 1); });
            later({[this, owner, from, &map, origin] {
                       if (owner->exited()) throw Fault("TMA: expected a program that waits for its stores, got one that has left");
                       walk_box(map, from, origin.data(), [&](u32 shared, u64 global, u32 inside) {
                           const u8* piece = owner->shared.read(shared, 16, true);
                           owner->shared.reserve(shared, 16, -1);
                           if (inside) std::memcpy(global_.at(global, inside, true), piece, inside);
                       });
                   },
                   &warp, lane, warp.store_group[lane]});
        }
    }
    return Step::NEXT;
}

void Machine::finish_copy(Warp& warp, int lane) {
    const Copy copy = warp.copies[lane].front();
    warp.copies[lane].pop_front();
    auto [cta, offset] = locate(warp, copy.to);
    u8* to = cta->shared.write(offset, copy.bytes, copy.thread);
    std::memset(to, 0, copy.bytes);
    if (copy.valid) std::memcpy(to, global_.at(copy.from, copy.valid, false), copy.valid);
}

// Tensor cores --------------------------------------------------------------------------------------------------------------------

namespace {

int columns_of(const Instruction& in) {
    for (const auto& word : in.order)
        if (word.rfind("m64n", 0) == 0) {
            if (word.substr(word.find('k')) != "k16") throw Fault("not emulated: " + in.mnemonic());
            return std::stoi(word.substr(4));
        }
    throw Fault("expected a shape in " + in.mnemonic());
}

float operand_number(const Type& type, u16 bits) { return type.letter == 'h' ? from_fp16(bits) : from_bf16(bits); }

// c + a . b over 16 numbers as published tests say of Hopper's tensor cores (Khattak and Mikaitis, arXiv 2512.07004): everything is
// aligned to the largest and cut off two bits below its last place, then added up exactly, then cut off to fp32. So sums of one
// sign come out too small: a logit of 40 by about 2e-4 over 4096 numbers.
float accumulated(float c, const float* a, const float* b) {
    constexpr int EXTRA = 2, PLACES = 23;
    double products[17], top = std::fabs(c);
    for (int k = 0; k < 16; ++k) {
        products[k] = double(a[k]) * b[k];
        top = std::max(top, std::fabs(products[k]));
    }
    products[16] = c;
    double plain = c;
    for (int k = 0; k < 16; ++k) plain += products[k];
    // Zeros, numbers near the ends of the range, infinity and NaN.
    if (!(top > 1e-30 && top < 1e37) || !(std::fabs(plain) < 1e38)) return float(plain);
    const double unit = as<double>((bits_of(top) & 0x7FF0000000000000ull) - (u64(PLACES + EXTRA) << 52)), inverse = 1.0 / unit;
    i32 sum = 0;
    for (int k = 0; k < 17; ++k) sum += i32(products[k] * inverse);  // 17 numbers below 2^26
    const int digits = sum ? 32 - __builtin_clz(u32(std::abs(sum))) : 0, behind = std::max(0, digits - (PLACES + 1));
    const i32 kept = std::abs(sum) >> behind << behind;
    return float((sum < 0 ? -kept : kept) * unit);
}

template <class Visit>
void operand_pieces(const SharedOperand& operand, int first_row, int rows, Visit visit) {
    for (int row = 0; row < rows; ++row)
        for (int half = 0; half < 2; ++half) visit(row, half, operand.address(first_row + row, 16 * half));
}

}  // namespace

// The four warps of a warp group issue the same products in the same order, each in its own time.
void Machine::issue_together(Warp& warp, const Product& product) {
    const std::pair<int, u64> key{warp.index / 4, warp.product_number++};
    const u32 all = 15, self = 1u << warp.index % 4;
    auto [found, first] = warp.cta->issued.try_emplace(key, Issued{product.instruction, product.a, product.b, product.accumulate, 0});
    Issued& one = found->second;
    if (one.instruction != product.instruction || one.a != product.a || one.b != product.b || one.accumulate != product.accumulate)
        throw Fault("wgmma: expected the same product in all four warps of the warp group");
    one.warps |= self;
    if (one.warps == all) warp.cta->issued.erase(found);
}

Step Machine::do_wgmma(Warp& warp, const Instruction& in, u32 lanes) {
    if (lanes != ALL) throw Fault("wgmma: expected whole warps");
    if (in.has("fence")) {
        warp.product_fence = warp.clock;
        return Step::NEXT;
    }
    if (in.has("commit_group")) {
        ++warp.product_group;
        return Step::NEXT;
    }
    if (in.has("wait_group")) {
        const int kept = int(read_one(warp, in.at(0), 0));
        while (!warp.products.empty() && warp.products.front().group < warp.product_group - kept) finish_product(warp);
        return Step::NEXT;
    }
    const int n = columns_of(in), rest = int(in.operands.size()) - n / 2;
    if (in.type(0).letter != 'f' || in.type(1).bits != 16) throw Fault("not emulated: " + in.mnemonic());
    const bool from_registers = rest == 9;
    if (rest != 7 && rest != 9) throw Fault("wgmma: unexpected operands");
    const size_t at = n / 2, b_at = at + (from_registers ? 4 : 1);
    for (size_t i = b_at + 2; i < in.operands.size(); ++i)
        if (in.at(i).value != (i < b_at + 4 ? 1 : 0)) throw Fault("wgmma: signs and transposed operands are not emulated");
    Product product{&in, 0, read_one(warp, in.at(b_at), 0), (predicate(warp, in.at(b_at + 1)) & 1) != 0, warp.product_group, {}};
    if (from_registers) {
        product.from_registers.resize(256);
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < 4; ++i) {
                const u32 pair = u32(read_one(warp, in.at(at + i), lane));
                for (int c = 0; c < 2; ++c) {
                    const int row = lane / 4 + 8 * (i & 1), k = lane % 4 * 2 + (i >> 1) * 8 + c;
                    product.from_registers[row * 16 + k] = operand_number(in.type(1), u16(pair >> (16 * c)));
                }
            }
    } else {
        product.a = read_one(warp, in.at(at), 0);
        for (int lane = 1; lane < LANES; ++lane)
            if (read_one(warp, in.at(at), lane) != product.a) throw Fault("wgmma: expected one descriptor in all threads");
    }
    for (int lane = 1; lane < LANES; ++lane)
        if (read_one(warp, in.at(b_at), lane) != product.b) throw Fault("wgmma: expected one descriptor in all threads");
    if (const u32 every = predicate(warp, in.at(b_at + 1)); every != 0 && every != ALL)
        throw Fault("wgmma: expected all threads to accumulate, or none");
    issue_together(warp, product);
    if (!launch_.eager_products)
        for (int i = 0; i < n / 2; ++i)
            if (warp.written[in.at(i).index] > warp.product_fence && (product.accumulate || warp.written[in.at(i).index]))
                throw Fault("wgmma: expected wgmma.fence after accumulators are written by other instructions");
    ++counts.products;
    Shared& shared = warp.cta->shared;
    if (!from_registers)
        operand_pieces(SharedOperand(product.a), warp.index % 4 * 16, 16, [&](int, int, u32 address) { shared.reserve(address, 16, 1); });
    operand_pieces(SharedOperand(product.b), 0, n, [&](int, int, u32 address) { shared.reserve(address, 16, 1); });
    for (int i = 0; i < n / 2; ++i) ++warp.in_flight[in.at(i).index];
    warp.products.push_back(std::move(product));
    if (launch_.eager_products) finish_product(warp);
    return Step::NEXT;
}

void Machine::finish_product(Warp& warp) {
    const Product product = std::move(warp.products.front());
    warp.products.pop_front();
    multiply(warp, product);
}

void Machine::multiply(Warp& warp, const Product& product) {
    const Instruction& in = *product.instruction;
    const int n = columns_of(in);
    Shared& shared = warp.cta->shared;
    std::vector<float> a(product.from_registers), b(n * 16);
    const auto fetch = [&](const SharedOperand& operand, int first_row, int rows, std::vector<float>& to) {
        operand_pieces(operand, first_row, rows, [&](int row, int half, u32 address) {
            const u8* piece = shared.read(address, 16, true);
            for (int i = 0; i < 8; ++i) {
                u16 bits;
                std::memcpy(&bits, piece + 2 * i, 2);
                to[row * 16 + 8 * half + i] = operand_number(in.type(1), bits);
            }
            shared.reserve(address, 16, -1);
        });
    };
    if (a.empty()) {
        a.resize(256);
        fetch(SharedOperand(product.a), warp.index % 4 * 16, 16, a);
    }
    fetch(SharedOperand(product.b), 0, n, b);
    for (int i = 0; i < n / 2; ++i) {
        const int index = in.at(i).index;
        --warp.in_flight[index];
        for (int lane = 0; lane < LANES; ++lane) {
            const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            const float before = product.accumulate ? as<float>(warp.registers[index][lane]) : 0.0f;
            warp.registers[index][lane] = bits_of(accumulated(before, &a[row * 16], &b[column * 16]));
        }
    }
}

// The product of one warp, m16n8k16, all operands in registers.
Step Machine::do_mma(Warp& warp, const Instruction& in, u32) {
    if (!in.has("m16n8k16") || in.types.size() != 4 || in.type(0).letter != 'f' || in.type(1).bits != 16)
        throw Fault("not emulated: " + in.mnemonic());
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int c = 0; c < 2; ++c) {
            for (int i = 0; i < 4; ++i)
                a[group + 8 * (i & 1)][pair + c + 8 * (i >> 1)] =
                    operand_number(in.type(1), u16(read_one(warp, in.at(4 + i), lane) >> (16 * c)));
            for (int i = 0; i < 2; ++i)
                b[pair + c + 8 * i][group] = operand_number(in.type(1), u16(read_one(warp, in.at(8 + i), lane) >> (16 * c)));
        }
    }
    std::array<std::array<u64, LANES>, 4> out;
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            double total = as<float>(read_one(warp, in.at(10 + i), lane));
            for (int k = 0; k < 16; ++k) total += double(a[row][k]) * b[k][column];
            out[i][lane] = bits_of(float(total));
        }
    for (int i = 0; i < 4; ++i) std::copy(out[i].begin(), out[i].end(), write(warp, in.at(i)));
    return Step::NEXT;
}

Step Machine::do_stmatrix(Warp& warp, const Instruction& in, u32) {
    if (in.has("trans")) throw Fault("not emulated: " + in.mnemonic());
    const int matrices = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
    for (int m = 0; m < matrices; ++m)
        for (int row = 0; row < 8; ++row) {
            const u32 address = own(warp, in, u32(read_one(warp, in.at(0), 8 * m + row)));
            if (address % 16) throw Fault("stmatrix: expected rows at multiples of 16 bytes");
            for (int pair = 0; pair < 4; ++pair) {
                const int lane = row * 4 + pair;
                auto [cta, offset] = locate(warp, address + 4 * pair);
                const u32 value = u32(read_one(warp, in.at(1 + m), lane));
                std::memcpy(cta->shared.write(offset, 4, warp.thread(lane)), &value, 4);
            }
        }
    return Step::NEXT;
}

Step Machine::do_ldmatrix(Warp& warp, const Instruction& in, u32) {
    if (in.has("trans")) throw Fault("not emulated: " + in.mnemonic());
    const int matrices = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
    std::array<std::array<u64, LANES>, 4> values;
    for (int m = 0; m < matrices; ++m)
        for (int lane = 0; lane < LANES; ++lane) {
            const u32 address = u32(read_one(warp, in.at(matrices), 8 * m + lane / 4));
            auto [cta, offset] = locate(warp, address + 4 * (lane % 4));
            u32 value;
            std::memcpy(&value, cta->shared.read(offset, 4, false), 4);
            values[m][lane] = value;
        }
    for (int m = 0; m < matrices; ++m) std::copy(values[m].begin(), values[m].end(), write(warp, in.at(m)));
    return Step::NEXT;
}

// Warps trade with what the program has to spare: nothing, until some have given.
Step Machine::do_setmaxnreg(Warp& warp, const Instruction& in, u32) {
    const int registers = int(in.at(0).value), gained = (registers - warp.registers_held) * LANES;
    if (registers < 24 || registers > 256 || registers % 8) throw Fault("setmaxnreg: expected a multiple of 8 from 24 to 256");
    if (in.has("inc") ? gained < 0 : gained > 0)
        throw Fault("setmaxnreg: expected to go " + std::string(in.has("inc") ? "up" : "down") + " from " +
                    std::to_string(warp.registers_held) + ", got " + std::to_string(registers));
    if (gained > warp.cta->free_registers) return Step::STAY;
    warp.cta->free_registers -= gained;
    warp.registers_held = registers;
    ++events_;
    return Step::NEXT;
}

}  // namespace ptx
