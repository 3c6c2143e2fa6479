// Logic, shifts, bit fields.
#include "lanes.h"

namespace ptx {

#define EMULATE_LOGIC(NAME, WHICH)                                                                               \
    Step Machine::NAME(Warp& warp, const Instruction& in, u32 lanes) {                                           \
        if (in.type().letter == 'p') {                                                                           \
            set_predicate(warp, in.at(0), u32(logic(WHICH, predicate(warp, in.at(1)), predicate(warp, in.at(2)))), lanes); \
            return Step::NEXT;                                                                                   \
        }                                                                                                        \
        return by_integer(in, [&](auto zero) {                                                                   \
            using T = decltype(zero);                                                                            \
            return binary<T>(warp, in, lanes, [](T a, T b) { return T(logic(WHICH, u64(a), u64(b))); });         \
        });                                                                                                      \
    }
EMULATE_LOGIC(do_and, Logic::AND)
EMULATE_LOGIC(do_or, Logic::OR)
EMULATE_LOGIC(do_xor, Logic::XOR)
#undef EMULATE_LOGIC

Step Machine::do_not(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.type().letter == 'p') {
        set_predicate(warp, in.at(0), ~predicate(warp, in.at(1)), lanes);
        return Step::NEXT;
    }
    return by_integer(in, [&](auto zero) {
        using T = decltype(zero);
        return unary<T>(warp, in, lanes, [](T a) { return T(~a); });
    });
}

Step Machine::do_lop3(Warp& warp, const Instruction& in, u32 lanes) {
    expect(in, 5);
    const u32 table = u32(read_one(warp, in.at(4), 0));
    Instruction three = in;
    three.operands.pop_back();
    return ternary<u32>(warp, three, lanes, [table](u32 a, u32 b, u32 c) {
        u32 d = 0;
        for (int i = 0; i < 8; ++i)
            if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return d;
    });
}

Step Machine::do_shl(Warp& warp, const Instruction& in, u32 lanes) {
    const u32 width = in.type().bits;
    return binary<u64>(warp, in, lanes, [width](u64 a, u64 b) {
        const u64 mask = width == 64 ? ~0ull : (1ull << width) - 1;
        return u32(b) >= width ? 0ull : (a << u32(b)) & mask;
    });
}

Step Machine::do_shr(Warp& warp, const Instruction& in, u32 lanes) {
    return by_integer(in, [&](auto zero) {
        using T = decltype(zero);
        u64 sa[LANES], sb[LANES];
        const u64 *a = read(warp, in.at(1), sa), *b = read(warp, in.at(2), sb);
        u64* d = write(warp, in.at(0));
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) {
                const u32 by = as<u32>(b[lane]), width = 8 * sizeof(T);
                const T value = as<T>(a[lane]);
                d[lane] = bits_of(by < width ? T(value >> by) : value < 0 ? T(-1) : T(0));
            }
        return Step::NEXT;
    });
}

Step Machine::do_shf(Warp& warp, const Instruction& in, u32 lanes) {
    const bool left = in.has("l"), wrap = in.has("wrap");
    return ternary<u32>(warp, in, lanes, [=](u32 a, u32 b, u32 c) {
        const u32 by = wrap ? c & 31 : std::min(c, 32u);
        const u64 both = u64(b) << 32 | a;
        return left ? u32((both << by) >> 32) : u32(both >> by);
    });
}

Step Machine::do_bfe(Warp& warp, const Instruction& in, u32 lanes) {
    const bool is_signed = in.type().letter == 's';
    const u32 width = in.type().bits;
    return ternary<u64>(warp, in, lanes, [=](u64 a, u64 start, u64 length) {
        const u32 from = u32(start) & 255, many = std::min(u32(length) & 255, width);
        if (width == 32) a = is_signed ? u64(i64(i32(a))) : u64(u32(a));
        if (many == 0) return u64(0);
        u64 field = from >= width ? 0 : a >> from;
        if (is_signed && from >= width) field = i64(a) < 0 ? ~0ull : 0;
        if (many < 64) {
            field &= (1ull << many) - 1;
            if (is_signed && field >> (many - 1) & 1) field |= ~0ull << many;
        }
        return width == 32 ? u64(u32(field)) : field;
    });
}

Step Machine::do_bfi(Warp& warp, const Instruction& in, u32 lanes) {
    u64 s[4][LANES];
    const u64* v[4];
    for (int i = 0; i < 4; ++i) v[i] = read(warp, in.at(i + 1), s[i]);
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            const u32 from = u32(v[2][lane]) & 255, many = u32(v[3][lane]) & 255;
            const u64 mask = from >= 64 ? 0 : (many >= 64 ? ~0ull : (1ull << many) - 1) << from;
            const u64 merged = (v[1][lane] & ~mask) | (v[0][lane] << (from & 63) & mask);
            d[lane] = in.type().bits == 32 ? u32(merged) : merged;
        }
    return Step::NEXT;
}

Step Machine::do_prmt(Warp& warp, const Instruction& in, u32 lanes) {
    for (const char* mode : {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})
        if (in.has(mode)) throw Fault("not emulated: " + in.mnemonic());
    return ternary<u32>(warp, in, lanes, [](u32 a, u32 b, u32 selector) {
        const u64 bytes = u64(b) << 32 | a;
        u32 d = 0;
        for (int i = 0; i < 4; ++i) {
            const u32 s = selector >> (4 * i) & 15;
            u32 byte = u32(bytes >> (8 * (s & 7))) & 255;
            if (s & 8) byte = byte & 128 ? 255 : 0;
            d |= byte << (8 * i);
        }
        return d;
    });
}

Step Machine::do_popc(Warp& warp, const Instruction& in, u32 lanes) {
    const bool wide = in.type().bits == 64;
    return unary<u64>(warp, in, lanes, [wide](u64 a) { return u32(__builtin_popcountll(wide ? a : u32(a))); });
}

Step Machine::do_clz(Warp& warp, const Instruction& in, u32 lanes) {
    const bool wide = in.type().bits == 64;
    return unary<u64>(warp, in, lanes, [wide](u64 a) {
        if (wide) return u32(a ? __builtin_clzll(a) : 64);
        return u32(u32(a) ? __builtin_clz(u32(a)) : 32);
    });
}

}  // namespace ptx
