// The scheduler, and the entry points for Python.
#include "machine.h"

namespace ptx {

const std::vector<std::pair<const char*, Machine::Handler>>& Machine::handlers() {
    using M = Machine;
    static const std::vector<std::pair<const char*, Handler>> table = {
        {"add", &M::do_add}, {"sub", &M::do_sub}, {"mul", &M::do_mul}, {"mad", &M::do_mad}, {"fma", &M::do_fma},
        {"div", &M::do_div}, {"rem", &M::do_rem}, {"neg", &M::do_neg}, {"abs", &M::do_abs}, {"min", &M::do_min_max},
        {"max", &M::do_min_max}, {"and", &M::do_and}, {"or", &M::do_or}, {"xor", &M::do_xor}, {"not", &M::do_not},
        {"lop3", &M::do_lop3}, {"shl", &M::do_shl}, {"shr", &M::do_shr}, {"shf", &M::do_shf}, {"bfe", &M::do_bfe},
        {"bfi", &M::do_bfi}, {"prmt", &M::do_prmt}, {"popc", &M::do_popc}, {"clz", &M::do_clz}, {"ex2", &M::do_ex2},
        {"lg2", &M::do_lg2}, {"rcp", &M::do_rcp}, {"sqrt", &M::do_sqrt}, {"rsqrt", &M::do_sqrt}, {"copysign", &M::do_copysign},
        {"selp", &M::do_selp}, {"setp", &M::do_setp}, {"mov", &M::do_mov}, {"cvt", &M::do_cvt}, {"cvta", &M::do_cvta},
        {"ld", &M::do_ld}, {"ldu", &M::do_ld}, {"st", &M::do_st}, {"atom", &M::do_atom}, {"red", &M::do_red},
        {"bra", &M::do_bra}, {"ret", &M::do_ret}, {"exit", &M::do_ret}, {"trap", &M::do_trap}, {"shfl", &M::do_shfl},
        {"vote", &M::do_vote}, {"elect", &M::do_elect}, {"redux", &M::do_redux}, {"bar", &M::do_bar}, {"barrier", &M::do_barrier},
        {"mbarrier", &M::do_mbarrier}, {"mapa", &M::do_mapa}, {"fence", &M::do_fence}, {"membar", &M::do_nothing},
        {"cp", &M::do_cp}, {"wgmma", &M::do_wgmma}, {"mma", &M::do_mma}, {"tcgen05", &M::do_tcgen05}, {"stmatrix", &M::do_stmatrix}, {"ldmatrix", &M::do_ldmatrix},
        {"setmaxnreg", &M::do_setmaxnreg}, {"prefetch", &M::do_nothing}, {"griddepcontrol", &M::do_nothing},
        {"nanosleep", &M::do_nothing},
    };
    return table;
}

int Machine::handler_of(const std::string& name) {
    const auto& table = handlers();
    for (size_t i = 0; i < table.size(); ++i)
        if (name == table[i].first) return int(i);
    return -1;
}

Step Machine::do_nothing(Warp&, const Instruction&, u32) { return Step::NEXT; }

Step Machine::do_trap(Warp&, const Instruction&, u32) { throw Fault("trap"); }

Step Machine::do_bra(Warp& warp, const Instruction& in, u32 lanes) {
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) warp.pc[lane] = i32(in.at(0).value);
    return Step::JUMPED;
}

Step Machine::do_ret(Warp& warp, const Instruction&, u32 lanes) {
    warp.live &= ~lanes;
    ++events_;
    if (warp.live == 0) {
        if (!warp.products.empty()) throw Fault("wgmma: expected every product to be waited for before the kernel ends");
        for (const auto& queue : warp.copies)
            if (!queue.empty()) throw Fault("cp.async: expected every copy to be waited for before the kernel ends");
    }
    return Step::JUMPED;
}

// Execute one instruction of the lanes at ``pc``; false when they are blocked.
bool Machine::step_group(Warp& warp, i32 pc) {
    const Instruction& in = launch_.program->instructions.at(pc);
    u32 lanes = 0;
    for (int lane = 0; lane < LANES; ++lane) lanes |= u32(warp.live >> lane & 1 && warp.pc[lane] == pc) << lane;
    if (in.converged && lanes != warp.live) return false;
    u32 active = lanes;
    if (in.guard >= 0) active &= in.guard_negated ? ~warp.predicates[in.guard] : warp.predicates[in.guard];
    ++warp.clock;
    Step step = Step::NEXT;
    if (active) {
        where = "line " + std::to_string(in.line);
        step = (this->*handlers()[in.code].second)(warp, in, active);
    }
    if (step == Step::STAY) return false;
    ++instructions_;
    const u32 next = step == Step::JUMPED ? lanes & ~active : lanes;
    for (int lane = 0; lane < LANES; ++lane)
        if (next >> lane & 1) ++warp.pc[lane];
    return true;
}

// Execute one instruction of a warp. Diverged lanes go on in the order of their program counters, so that they reconverge.
bool Machine::advance(Warp& warp) {
    std::vector<i32> places;
    i32 first = -1;
    bool together = true;
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(warp.live >> lane & 1)) continue;
        if (first < 0) first = warp.pc[lane];
        together = together && warp.pc[lane] == first;
    }
    if (together) return step_group(warp, first);
    for (int lane = 0; lane < LANES; ++lane)
        if (warp.live >> lane & 1) places.push_back(warp.pc[lane]);
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
    for (i32 pc : places)
        if (step_group(warp, pc)) return true;
    return false;
}

bool Machine::finish_one_asynchronous() {
    std::vector<Warp*> multiplying;
    for (const auto& cta : ctas_)
        for (const auto& warp : cta->warps)
            if (!warp->products.empty()) multiplying.push_back(warp.get());
    std::vector<std::pair<Warp*, int>> copying;
    for (const auto& cta : ctas_)
        for (const auto& warp : cta->warps)
            for (int lane = 0; lane < LANES; ++lane)
                if (!warp->copies[lane].empty()) copying.emplace_back(warp.get(), lane);
    std::vector<Cta*> tensor;
    for (const auto& cta : ctas_)
        if (!cta->tensor_products.empty()) tensor.push_back(cta.get());
    const size_t choices = pending_.size() + multiplying.size() + copying.size() + tensor.size();
    if (choices == 0) return false;
    size_t chosen = random_() % choices;
    if (chosen < pending_.size()) {
        Asynchronous operation = std::move(pending_[chosen]);
        pending_.erase(pending_.begin() + chosen);
        where = "an asynchronous copy";
        operation.run();
        ++events_;
        return true;
    }
    chosen -= pending_.size();
    where = "an asynchronous product";
    if (chosen < multiplying.size()) {
        finish_product(*multiplying[chosen]);
        return true;
    }
    chosen -= multiplying.size();
    if (chosen < copying.size()) finish_copy(*copying[chosen].first, copying[chosen].second);
    else finish_tensor_product(*tensor[chosen - copying.size()]);
    return true;
}

void Machine::deadlock() {
    std::string text = "deadlock: expected some thread to go on, got";
    for (const auto& cta : ctas_)
        for (const auto& warp : cta->warps)
            for (int lane = 0; lane < LANES; ++lane) {
                if (!(warp->live >> lane & 1) || (lane > 0 && warp->live >> (lane - 1) & 1 && warp->pc[lane] == warp->pc[lane - 1])) continue;
                const Instruction& in = launch_.program->instructions[warp->pc[lane]];
                text += "\n  program " + std::to_string(cta->rank) + " warp " + std::to_string(warp->index) + " lane " + std::to_string(lane) +
                        ": line " + std::to_string(in.line) + " " + in.mnemonic();
            }
    where = "everywhere";
    throw Fault(text);
}

void Machine::check_the_end() {
    where = "the end of the kernel";
    for (const auto& cta : ctas_)
        if (!cta->issued.empty()) throw Fault("wgmma: expected every product from all four warps of a warp group");
    if (!pending_.empty()) throw Fault("TMA: expected every copy to be waited for, got " + std::to_string(pending_.size()) + " left");
    for (const auto& cta : ctas_)
        if (!cta->tensor_products.empty() || cta->tensor_columns)
            throw Fault("tcgen05: expected products to be waited for and tensor memory to be given back");
    for (const auto& cta : ctas_)
        for (const auto& barrier : cta->named)
            if (barrier.arrived) throw Fault("bar: expected every barrier to be complete, got one with arrivals left over");
    if (cluster_barrier_.arrived) throw Fault("barrier.cluster: expected it to be complete, got arrivals left over");
}

void Machine::run_cluster(int first) {
    ctas_.clear();
    cluster_barrier_ = {};
    const auto [nx, ny, nz] = launch_.grid;
    const int warps = (threads() + LANES - 1) / LANES;
    for (int rank = 0; rank < launch_.cluster; ++rank) {
        const int index = first + rank;
        ctas_.push_back(std::make_unique<Cta>(
            Cta{rank, {index % nx, index / nx % ny, index / (nx * ny)}, Shared(launch_.shared_base, launch_.shared_bytes), {}, {}, {}, {}, {}, {}, {}}));
        for (int w = 0; w < warps; ++w) {
            auto warp = std::make_unique<Warp>();
            warp->cta = ctas_.back().get();
            warp->index = w;
            const int lanes = std::min(LANES, threads() - w * LANES);
            // A kernel with setmaxnreg is launched with one program per multiprocessor and all 65536 registers, in multiples of 8 a thread.
            warp->registers_held = std::min(65536 / (warps * LANES) / 8 * 8, 256);
            warp->live = lanes == LANES ? ALL : (1u << lanes) - 1;
            warp->registers.resize(launch_.program->registers);
            warp->predicates.resize(launch_.program->predicates);
            warp->in_flight.resize(launch_.program->registers);
            warp->written.resize(launch_.program->registers);
            warp->copies.resize(LANES);
            ctas_.back()->warps.push_back(std::move(warp));
        }
    }
    std::vector<Warp*> all;
    for (const auto& cta : ctas_)
        for (const auto& warp : cta->warps) all.push_back(warp.get());
    // Every other seed is unfair: warps late in a random order rarely run while earlier ones can.
    std::shuffle(all.begin(), all.end(), random_);
    const bool unfair = launch_.seed % 2 == 1;
    std::vector<Warp*> ready;
    while (true) {
        ready.clear();
        bool alive = false;
        for (Warp* warp : all) {
            alive = alive || warp->live;
            if (warp->live && !(warp->blocked && warp->blocked_since == events_)) ready.push_back(warp);
        }
        if (!alive) break;
        // The higher the lateness, the rarer asynchronous work is picked while a warp can run.
        const bool pick = ready.empty() || std::uniform_real_distribution<>()(random_) > 0.5 + 0.5 * launch_.lateness;
        if (pick && finish_one_asynchronous()) continue;
        if (ready.empty()) deadlock();
        Warp& warp = *ready[unfair && random_() % 16 ? 0 : random_() % ready.size()];
        warp.blocked = false;
        for (int quantum = 1 + int(random_() % 64); quantum > 0 && warp.live; --quantum) {
            const u64 before = events_;
            if (!advance(warp)) {
                warp.blocked = true;
                warp.blocked_since = before == events_ ? before : events_;
                break;
            }
        }
    }
    check_the_end();
}

void Machine::run() {
    const auto [x, y, z] = launch_.grid;
    const int programs = x * y * z;
    if (programs % launch_.cluster) throw Fault("launch: expected whole clusters");
    for (int first = 0; first < programs; first += launch_.cluster) run_cluster(first);
}

}  // namespace ptx

// ---------------------------------------------------------------------------------------------------------------------------------

using namespace ptx;

namespace {
thread_local std::string message;
}

extern "C" {

const char* last_error() { return message.c_str(); }

void* create_program(int registers, int predicates) { return new Program{{}, registers, predicates}; }

void destroy_program(void* program) { delete static_cast<Program*>(program); }

// Adds an instruction. Returns 0, or 1 if it is unknown.
int add(void* program, const char* mnemonic, int guard, int negated, int line, int n, const int* kinds, const int* indices, const i64* values) {
    Instruction in = decode(mnemonic);
    in.guard = guard;
    in.guard_negated = negated;
    in.line = line;
    for (int i = 0; i < n; ++i) in.operands.push_back({Kind(kinds[i]), indices[i], values[i]});
    in.code = Machine::handler_of(in.name);
    if (in.code < 0) {
        message = std::string("instruction ") + mnemonic + " is not emulated";
        return 1;
    }
    const bool of_a_warp = in.name == "bar" && in.has("warp"), cluster = in.name == "barrier" && in.has("cluster");
    in.converged = in.has("aligned") || in.name == "wgmma" || in.name == "setmaxnreg" || in.name == "stmatrix" ||
                   in.name == "ldmatrix" || (in.name == "bar" && !of_a_warp) || (in.name == "barrier" && !cluster);
    static_cast<Program*>(program)->instructions.push_back(std::move(in));
    return 0;
}

// Runs the grid. ranges: (start, bytes, writable) of global memory. Returns 0, or 1 with ``last_error``.
int run(const void* program, const u64* ranges, int n_ranges, const u8* parameters, int n_parameters, int grid, int block, int cluster,
        u32 shared_base, u32 shared_bytes, u64 seed, double lateness) {
    Global global;
    for (int i = 0; i < n_ranges; ++i) global.allow(ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2] != 0);
    const Launch launch{static_cast<const Program*>(program), std::vector<u8>(parameters, parameters + n_parameters), {grid, 1, 1},
                        {block, 1, 1}, cluster, shared_base, shared_bytes, seed, lateness};
    Machine machine(launch, global);
    try {
        machine.run();
    } catch (const std::exception& fault) {
        message = machine.where + ": " + fault.what();
        return 1;
    }
    return 0;
}
}
