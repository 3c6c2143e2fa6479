// Asynchronous copies: cp.async and TMA.
#include "lanes.h"

namespace ptx {

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
            Cta* owner = warp.cta;
            const u64 fenced = warp.proxy_fence[lane];
            walk_box(map, from, origin.data(), [&](u32 shared, u64, u32) { owner->shared.reserve(shared, 16, 1); });
            later({[this, owner, from, &map, origin, fenced] {
                       if (owner->exited()) throw Fault("TMA: expected a program that waits for its stores, got one that has left");
                       walk_box(map, from, origin.data(), [&](u32 shared, u64 global, u32 inside) {
                           const u8* piece = owner->shared.read_fenced(shared, 16, fenced);
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

}  // namespace ptx
