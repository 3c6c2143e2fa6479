// Comparison, selection, moves, conversion.
#include "lanes.h"

namespace ptx {

Step Machine::do_selp(Warp& warp, const Instruction& in, u32 lanes) {
    u64 sa[LANES], sb[LANES];
    const u64 *a = read(warp, in.at(1), sa), *b = read(warp, in.at(2), sb);
    const u32 chosen = predicate(warp, in.at(3));
    u64* d = write(warp, in.at(0));
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = chosen >> lane & 1 ? a[lane] : b[lane];
    return Step::NEXT;
}

template <class T>
Step Machine::compare(Warp& warp, const Instruction& in, u32 lanes) {
    const std::string& how = in.order.at(0);
    const bool second = in.operands.size() > 3 && in.at(1).kind != Kind::REGISTER && in.at(1).kind != Kind::IMMEDIATE &&
                        in.at(1).kind != Kind::SPECIAL;
    const size_t from = second ? 2 : 1;
    u64 sa[LANES], sb[LANES];
    const u64 *a = read(warp, in.at(from), sa), *b = read(warp, in.at(from + 1), sb);
    static const std::vector<std::string> ORDERED = {"eq", "ne", "lt", "le", "gt", "ge"};
    static const std::vector<std::string> UNORDERED = {"equ", "neu", "ltu", "leu", "gtu", "geu"};
    static const std::vector<std::string> UNSIGNED = {"eq", "ne", "lo", "ls", "hi", "hs"};
    int which = -1;
    bool unordered = false;
    for (int i = 0; i < 6; ++i) {
        if (how == ORDERED[i] || how == UNSIGNED[i]) which = i;
        if (how == UNORDERED[i]) which = i, unordered = true;
    }
    if (how == "num") which = 6;
    if (how == "nan") which = 7;
    if (which < 0) throw Fault("unknown comparison in " + in.mnemonic());
    u32 result = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        const T x = as<T>(a[lane]), y = as<T>(b[lane]);
        const bool nan = x != x || y != y;
        bool holds = false;
        switch (which) {
            case 0: holds = x == y; break;
            case 1: holds = x != y && !nan; break;
            case 2: holds = x < y; break;
            case 3: holds = x <= y; break;
            case 4: holds = x > y; break;
            case 5: holds = x >= y; break;
            case 6: holds = !nan; break;
            case 7: holds = nan; break;
        }
        result |= u32(holds || (unordered && nan)) << lane;
    }
    u32 complement = ~result;
    if (in.has("and") || in.has("or") || in.has("xor")) {
        const u32 other = predicate(warp, in.at(from + 2));
        const Logic combine = in.has("and") ? Logic::AND : in.has("or") ? Logic::OR : Logic::XOR;
        result = u32(logic(combine, result, other));
        complement = u32(logic(combine, complement, other));
    }
    set_predicate(warp, in.at(0), result, lanes);
    if (second) set_predicate(warp, in.at(1), complement, lanes);
    return Step::NEXT;
}

Step Machine::do_setp(Warp& warp, const Instruction& in, u32 lanes) {
    return by_type(in, [&](auto zero) { return compare<decltype(zero)>(warp, in, lanes); });
}

Step Machine::do_mov(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.type().letter == 'p') {
        set_predicate(warp, in.at(0), predicate(warp, in.at(1)), lanes);
        return Step::NEXT;
    }
    const size_t n = in.operands.size();
    if (n == 2) {
        const int width = in.type().bits;
        const u64 mask = width == 64 ? ~0ull : (1ull << width) - 1;
        return unary<u64>(warp, in, lanes, [mask](u64 a) { return a & mask; });
    }
    // A vector of n - 1 parts, packed into or unpacked from one register; the parser marks which by a leading sink.
    const int part = in.type().bits / int(n - 2);
    const u64 mask = (1ull << part) - 1;
    if (in.at(0).kind == Kind::SINK && in.at(0).value == 1) {  // d <- {a, b, ...}
        std::vector<std::array<u64, LANES>> parts(n - 2);
        for (size_t i = 2; i < n; ++i)
            for (int lane = 0; lane < LANES; ++lane) parts[i - 2][lane] = read_one(warp, in.at(i), lane) & mask;
        u64* d = write(warp, in.at(1));
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) {
                d[lane] = 0;
                for (size_t i = 0; i < parts.size(); ++i) d[lane] |= parts[i][lane] << (part * i);
            }
    } else {  // {d, e, ...} <- a, the last operand
        u64 scratch[LANES];
        const u64* a = read(warp, in.at(n - 1), scratch);
        std::array<u64, LANES> copy;
        std::copy(a, a + LANES, copy.begin());
        for (size_t i = 1; i < n - 1; ++i) {
            u64* d = write(warp, in.at(i));
            for (int lane = 0; lane < LANES; ++lane)
                if (lanes >> lane & 1) d[lane] = copy[lane] >> (part * (i - 1)) & mask;
        }
    }
    return Step::NEXT;
}

namespace {

// Only rounding to nearest is emulated.
void nearest_only(const Instruction& in) {
    for (const char* mode : {"rz", "rm", "rp"})
        if (in.has(mode)) throw Fault("expected rounding to nearest, got " + in.mnemonic());
}

double number(const Type& type, u64 bits) {
    switch (type.letter) {
        case 'f': return type.bits == 32 ? double(as<float>(bits)) : as<double>(bits);
        case 'h': return from_fp16(u16(bits));
        case 'g': return from_bf16(u16(bits));
        case 's': return type.bits == 64 ? double(as<i64>(bits)) : type.bits == 32 ? as<i32>(bits) : type.bits == 16 ? as<i16>(bits) : as<i8>(bits);
        default: return type.bits == 64 ? double(bits) : double(bits & ((1ull << type.bits) - 1));
    }
}

bool floating(const Type& type) { return type.letter == 'f' || type.letter == 'h' || type.letter == 'g'; }

u64 rounded_to(const Type& type, double x) {
    switch (type.letter) {
        case 'f': return type.bits == 32 ? bits_of(float(x)) : bits_of(x);
        case 'h': return to_fp16(float(x));
        default: return to_bf16(float(x));
    }
}

}  // namespace

Step Machine::do_cvt(Warp& warp, const Instruction& in, u32 lanes) {
    const Type to = in.type(0), from = in.type(1);
    if ((in.has("sat") && !floating(to)) || in.has("satfinite") || in.has("relu")) throw Fault("not emulated: " + in.mnemonic());
    if (to.packed == 2) {  // the first source becomes the upper half
        nearest_only(in);
        const Type half = {to.letter, 16, 1};
        return binary<float>(warp, in, lanes, [&](float high, float low) {
            return u32(rounded_to(half, high) << 16 | rounded_to(half, low));
        });
    }
    if (!floating(to) && !floating(from)) {
        return unary<u64>(warp, in, lanes, [&](u64 a) {
            const u32 keep = from.bits;
            u64 x = keep == 64 ? a : a & ((1ull << keep) - 1);
            if (from.letter == 's' && keep < 64 && x >> (keep - 1) & 1) x |= ~0ull << keep;
            if (to.bits < 64 && to.letter != 's') x &= (1ull << to.bits) - 1;
            if (to.bits < 64 && to.letter == 's') x = u64(i64(x << (64 - to.bits)) >> (64 - to.bits));
            return x;
        });
    }
    return unary<u64>(warp, in, lanes, [&](u64 a) {
        double x = number(from, a);
        if (in.has("ftz") && from.bits == 32) x = flushed(float(x));
        if (in.has("sat")) x = x > 0.0 ? std::min(x, 1.0) : 0.0;  // NaN becomes 0
        if (floating(to)) {
            if (in.has("rni")) return rounded_to(to, std::nearbyint(x));
            if (in.has("rzi")) return rounded_to(to, std::trunc(x));
            if (in.has("rmi")) return rounded_to(to, std::floor(x));
            if (in.has("rpi")) return rounded_to(to, std::ceil(x));
            nearest_only(in);
            return rounded_to(to, x);
        }
        if (std::isnan(x)) x = 0;
        x = in.has("rni") ? std::nearbyint(x) : in.has("rmi") ? std::floor(x) : in.has("rpi") ? std::ceil(x) : std::trunc(x);
        const bool is_signed = to.letter == 's';
        const double low = is_signed ? -std::ldexp(1.0, to.bits - 1) : 0.0, high = std::ldexp(1.0, to.bits - is_signed) - 1;
        x = std::min(std::max(x, low), high);
        return is_signed ? u64(i64(x)) : u64(x);
    });
}

Step Machine::do_cvta(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.has("local")) throw Fault("local memory is not emulated");
    if (in.has("shared") && in.has("to")) return unary<u64>(warp, in, lanes, [](u64 a) { return a - WINDOW; });
    if (in.has("shared")) return unary<u64>(warp, in, lanes, [](u64 a) { return a + WINDOW; });
    return unary<u64>(warp, in, lanes, [](u64 a) { return a; });
}

}  // namespace ptx
