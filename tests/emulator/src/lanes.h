// Helpers that apply one function in every active lane.
#pragma once

#include "machine.h"

namespace ptx {

// Refuse forms of an instruction with other operands than the function reads.
inline void expect(const Instruction& in, size_t operands) {
    if (in.operands.size() != operands) throw Fault("not emulated with " + std::to_string(in.operands.size()) + " operands: " + in.mnemonic());
}

template <class T, class F>
Step Machine::unary(Warp& warp, const Instruction& in, u32 lanes, F f) {
    expect(in, 2);
    u64 sa[LANES];
    const u64* a = read(warp, in.at(1), sa);
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = bits_of(f(as<T>(a[lane])));
    return Step::NEXT;
}

template <class T, class F>
Step Machine::binary(Warp& warp, const Instruction& in, u32 lanes, F f) {
    expect(in, 3);
    u64 sa[LANES], sb[LANES];
    const u64 *a = read(warp, in.at(1), sa), *b = read(warp, in.at(2), sb);
    u64* d = write(warp, in.at(0));
    if (lanes == ALL) {
        for (int lane = 0; lane < LANES; ++lane) d[lane] = bits_of(f(as<T>(a[lane]), as<T>(b[lane])));
    } else {
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) d[lane] = bits_of(f(as<T>(a[lane]), as<T>(b[lane])));
    }
    return Step::NEXT;
}

template <class T, class F>
Step Machine::ternary(Warp& warp, const Instruction& in, u32 lanes, F f) {
    expect(in, 4);
    u64 sa[LANES], sb[LANES], sc[LANES];
    const u64 *a = read(warp, in.at(1), sa), *b = read(warp, in.at(2), sb), *c = read(warp, in.at(3), sc);
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = bits_of(f(as<T>(a[lane]), as<T>(b[lane]), as<T>(c[lane])));
    return Step::NEXT;
}

template <class F>
Step Machine::by_integer(const Instruction& in, F f) {
    const Type& type = in.type();
    if (type.letter != 'b' && type.letter != 'u' && type.letter != 's') throw Fault("expected an integer type in " + in.mnemonic());
    const bool is_signed = type.letter == 's';
    switch (type.bits) {
        case 8: return is_signed ? f(i8()) : f(u8());
        case 16: return is_signed ? f(i16()) : f(u16());
        case 32: return is_signed ? f(i32()) : f(u32());
        case 64: return is_signed ? f(i64()) : f(u64());
        default: throw Fault("expected an integer type in " + in.mnemonic());
    }
}

template <class F>
Step Machine::by_type(const Instruction& in, F f) {
    const Type& type = in.type();
    if (type.letter == 'f') return type.bits == 32 ? f(float()) : f(double());
    if (type.letter == 'h' || type.letter == 'g') throw Fault("half-precision arithmetic is not emulated: " + in.mnemonic());
    return by_integer(in, f);
}

enum class Logic { AND, OR, XOR };
inline u64 logic(Logic which, u64 a, u64 b) { return which == Logic::AND ? a & b : which == Logic::OR ? a | b : a ^ b; }

constexpr u64 WINDOW = 0x7F0000000000ull << 8;  // generic addresses of shared memory
constexpr u32 RANK_SHIFT = 24;                  // shared::cluster: (rank + 1) above the offset; 0 means the own program

inline size_t address_of(const Instruction& in) {
    for (size_t i = 0; i < in.operands.size(); ++i)
        if (in.operands[i].kind == Kind::ADDRESS || in.operands[i].kind == Kind::PARAMETER) return i;
    throw Fault("expected an address in " + in.mnemonic());
}

// The operation of an atomic or a reduction.
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

}  // namespace ptx
