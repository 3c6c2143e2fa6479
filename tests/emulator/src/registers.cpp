// Registers, predicates, special registers.
#include "machine.h"

namespace ptx {

void Machine::touch(Warp& warp, int index) const {
    if (warp.in_flight[index])
        throw Fault("wgmma: expected registers to be left alone until wgmma.wait_group, got an access in between");
}

u64 Machine::special(const Warp& warp, Special which, int lane) const {
    const auto& [x, y, z] = launch_.block;
    const int thread = warp.thread(lane);
    switch (which) {
        case Special::TID_X: return thread % x;
        case Special::TID_Y: return thread / x % y;
        case Special::TID_Z: return thread / (x * y);
        case Special::NTID_X: return x;
        case Special::NTID_Y: return y;
        case Special::NTID_Z: return z;
        case Special::CTAID_X: return warp.cta->position[0];
        case Special::CTAID_Y: return warp.cta->position[1];
        case Special::CTAID_Z: return warp.cta->position[2];
        case Special::NCTAID_X: return launch_.grid[0];
        case Special::NCTAID_Y: return launch_.grid[1];
        case Special::NCTAID_Z: return launch_.grid[2];
        case Special::LANEID: return lane;
        case Special::WARPID: return warp.index;
        case Special::CLUSTER_CTARANK: return warp.cta->rank;
        case Special::CLUSTER_NCTARANK: return launch_.cluster;
        case Special::CLUSTERID_X: return warp.cta->position[0] / launch_.cluster;
        case Special::NCLUSTERID_X: return launch_.grid[0] / launch_.cluster;
        case Special::CLOCK: return instructions_;
    }
    throw Fault("unknown special register");
}

u64 Machine::read_one(Warp& warp, const Operand& operand, int lane) {
    switch (operand.kind) {
        case Kind::REGISTER: touch(warp, operand.index); return warp.registers[operand.index][lane];
        case Kind::IMMEDIATE: return u64(operand.value);
        case Kind::PARAMETER: return u64(reinterpret_cast<uintptr_t>(launch_.parameters.data())) + operand.value;
        case Kind::SPECIAL: return special(warp, Special(operand.index), lane);
        case Kind::ADDRESS:
            if (operand.index < 0) return u64(operand.value);
            touch(warp, operand.index);
            return warp.registers[operand.index][lane] + operand.value;
        case Kind::PREDICATE:
        case Kind::NOT_PREDICATE: return predicate(warp, operand) >> lane & 1;
        default: throw Fault("expected an operand with a value");
    }
}

const u64* Machine::read(Warp& warp, const Operand& operand, u64* scratch) {
    if (operand.kind == Kind::REGISTER) {
        touch(warp, operand.index);
        return warp.registers[operand.index].data();
    }
    for (int lane = 0; lane < LANES; ++lane) scratch[lane] = read_one(warp, operand, lane);
    return scratch;
}

u64* Machine::write(Warp& warp, const Operand& operand) {
    static thread_local u64 sink[LANES];
    if (operand.kind == Kind::SINK) return sink;
    if (operand.kind != Kind::REGISTER) throw Fault("expected a register to write");
    touch(warp, operand.index);
    warp.written[operand.index] = warp.clock;
    return warp.registers[operand.index].data();
}

u32 Machine::predicate(const Warp& warp, const Operand& operand) const {
    if (operand.kind == Kind::IMMEDIATE) return operand.value ? ALL : 0;
    const u32 bits = warp.predicates[operand.index];
    return operand.kind == Kind::NOT_PREDICATE ? ~bits : bits;
}

void Machine::set_predicate(Warp& warp, const Operand& operand, u32 bits, u32 lanes) {
    if (operand.kind == Kind::SINK) return;
    if (operand.kind != Kind::PREDICATE) throw Fault("expected a predicate to write");
    u32& to = warp.predicates[operand.index];
    to = (to & ~lanes) | (bits & lanes);
}

}  // namespace ptx
