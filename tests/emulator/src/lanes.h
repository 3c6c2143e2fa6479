// Shapes of instructions: the same function for every lane that takes part.
#pragma once

#include "machine.h"

namespace ptx {

// A form of an instruction with other operands than the function below would read is another instruction.
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

}  // namespace ptx
