// Barriers: named, cluster and mbarrier; fences.
#include "lanes.h"

namespace ptx {

Step Machine::do_bar(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.has("warp")) {
        const u32 members = u32(read_one(warp, in.at(0), __builtin_ctz(lanes))) & warp.live;
        return members & ~lanes ? Step::STAY : Step::NEXT;
    }
    const int id = int(read_one(warp, in.at(0), __builtin_ctz(lanes)));
    const int expected = in.operands.size() > 1 ? int(read_one(warp, in.at(1), __builtin_ctz(lanes))) : threads();
    if (id < 0 || id > 15 || expected % LANES) throw Fault("bar: expected a barrier 0 to 15 and whole warps");
    NamedBarrier& barrier = warp.cta->named[id];
    if (warp.named == id) {  // arrived earlier
        if (barrier.generation == warp.named_generation) return Step::STAY;
        warp.named = -1;
        return Step::NEXT;
    }
    if (!in.has("sync") && !in.has("arrive")) throw Fault("not emulated: " + in.mnemonic());
    if (barrier.arrived == 0) barrier.expected = expected, barrier.synchronizes = true;
    if (in.has("arrive")) barrier.synchronizes = false;
    if (barrier.expected != expected) throw Fault("bar: expected all warps to name the same number of threads");
    ++events_;
    const u64 generation = barrier.generation;
    barrier.arrived += LANES;
    if (barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        if (barrier.synchronizes && expected == threads()) ++warp.cta->shared.epoch;
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

// Triton's kernels have no clusters and omit the fence.
Barrier& Machine::known_to_others(Barrier& barrier) const {
    if (launch_.cluster > 1 && barrier.unfenced_by >= 0)
        throw Fault("mbarrier: expected fence.mbarrier_init after thread " + std::to_string(barrier.unfenced_by) +
                    " had initialised it, before another program or a copy arrives");
    if (launch_.cluster > 1 && barrier.made_in == cluster_barrier_.generation)
        throw Fault("mbarrier: expected a cluster barrier between its initialisation and the first arrival from elsewhere");
    return barrier;
}

void Machine::update_phase(Barrier& barrier) {
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
    update_phase(b);
}

void Machine::complete(Cta& cta, u32 address, i64 bytes) {
    Barrier& b = known_to_others(barrier(cta, address));
    b.bytes -= bytes;
    update_phase(b);
}

Step Machine::do_mbarrier(Warp& warp, const Instruction& in, u32 lanes) {
    const size_t at = address_of(in);
    const auto value = [&](int lane, i64 otherwise) {
        return at + 1 < in.operands.size() ? i64(u32(read_one(warp, in.at(at + 1), lane))) : otherwise;
    };
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
            if (lanes >> lane & 1) {
                warp.cta->shared.fence(warp.thread(lane));
                warp.proxy_fence[lane] = warp.cta->shared.epoch;
            }
    } else if (!in.has("mbarrier_init")) {
        return Step::NEXT;
    }
    for (auto& [address, barrier] : warp.cta->barriers)
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1 && barrier.unfenced_by == warp.thread(lane)) barrier.unfenced_by = -1;
    return Step::NEXT;
}

}  // namespace ptx
