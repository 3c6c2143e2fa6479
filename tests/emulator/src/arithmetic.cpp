// Instructions that work on each thread by itself: arithmetic, logic, conversion.
#include <cfenv>

#include "lanes.h"

namespace ptx {

// Registers -----------------------------------------------------------------------------------------------------------------------

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
        case Special::CLOCK: return counts.instructions;
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

namespace {

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;

// The rounding of an instruction, from here to the end of the scope. Operands and results are in memory, which the compiler must
// take the calls to read and write: no arithmetic leaves the scope.
struct Rounding {
    explicit Rounding(const Instruction& in) {
        std::fesetround(in.has("rz") ? FE_TOWARDZERO : in.has("rm") ? FE_DOWNWARD : in.has("rp") ? FE_UPWARD : FE_TONEAREST);
    }
    ~Rounding() { std::fesetround(FE_TONEAREST); }
};

// Conversions are not emulated with another rounding.
void nearest_only(const Instruction& in) {
    for (const char* mode : {"rz", "rm", "rp"})
        if (in.has(mode)) throw Fault("expected rounding to nearest, got " + in.mnemonic());
}

template <class T>
T maybe_flushed(const Instruction& in, T x) {
    if constexpr (std::is_same_v<T, float>) {
        static const std::string ftz = "ftz";
        return in.words.count(ftz) ? flushed(x) : x;
    } else {
        return x;
    }
}

}  // namespace

namespace {

// f32x2: the same function of the lower and of the upper halves.
template <class F>
u64 halves(F f, u64 a, u64 b, u64 c = 0) {
    const auto half = [](u64 x, int i) { return as<float>(x >> (32 * i) & 0xFFFFFFFF); };
    return bits_of(f(half(a, 0), half(b, 0), half(c, 0))) | bits_of(f(half(a, 1), half(b, 1), half(c, 1))) << 32;
}
bool paired(const Instruction& in) { return in.type().packed == 2 && in.type().letter == 'f'; }

}  // namespace

// Arithmetic ----------------------------------------------------------------------------------------------------------------------

Step Machine::do_add(Warp& warp, const Instruction& in, u32 lanes) {
    const Rounding rounding(in);
    if (paired(in))
        return binary<u64>(warp, in, lanes, [&](u64 a, u64 b) {
            return halves([&](float x, float y, float) { return maybe_flushed(in, x + y); }, a, b);
        });
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [&](T a, T b) {
            if constexpr (is_float<T>) return maybe_flushed(in, T(a + b));
            else return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
        });
    });
}

Step Machine::do_sub(Warp& warp, const Instruction& in, u32 lanes) {
    const Rounding rounding(in);
    if (paired(in))
        return binary<u64>(warp, in, lanes, [&](u64 a, u64 b) {
            return halves([&](float x, float y, float) { return maybe_flushed(in, x - y); }, a, b);
        });
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [&](T a, T b) {
            if constexpr (is_float<T>) return maybe_flushed(in, T(a - b));
            else return T(std::make_unsigned_t<T>(a) - std::make_unsigned_t<T>(b));
        });
    });
}

namespace {
// The whole product of two integers.
template <class T>
__int128 whole(T a, T b) { return __int128(a) * __int128(b); }
template <class T>
T part(const Instruction& in, T a, T b) {
    const auto product = whole(a, b);
    return in.has("hi") ? T(product >> (8 * sizeof(T))) : T(product);
}
}  // namespace

Step Machine::do_mul(Warp& warp, const Instruction& in, u32 lanes) {
    const Rounding rounding(in);
    if (paired(in))
        return binary<u64>(warp, in, lanes, [&](u64 a, u64 b) {
            return halves([&](float x, float y, float) { return maybe_flushed(in, x * y); }, a, b);
        });
    if (in.has("wide")) {
        switch (in.type().bits * (in.type().letter == 's' ? -1 : 1)) {
            case 16: return binary<u16>(warp, in, lanes, [](u16 a, u16 b) { return u32(a) * b; });
            case -16: return binary<i16>(warp, in, lanes, [](i16 a, i16 b) { return i32(a) * b; });
            case 32: return binary<u32>(warp, in, lanes, [](u32 a, u32 b) { return u64(a) * b; });
            case -32: return binary<i32>(warp, in, lanes, [](i32 a, i32 b) { return i64(a) * b; });
        }
    }
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [&](T a, T b) {
            if constexpr (is_float<T>) return maybe_flushed(in, T(a * b));
            else return part(in, a, b);
        });
    });
}

Step Machine::do_mad(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.type().letter == 'f') return do_fma(warp, in, lanes);
    if (in.has("wide")) {
        u64 sa[LANES], sb[LANES], sc[LANES];
        const u64 *a = read(warp, in.at(1), sa), *b = read(warp, in.at(2), sb), *c = read(warp, in.at(3), sc);
        u64* d = write(warp, in.at(0));
        const bool is_signed = in.type().letter == 's';
        if (in.type().bits != 32) throw Fault("not emulated: " + in.mnemonic());
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1)
                d[lane] = c[lane] + (is_signed ? u64(i64(as<i32>(a[lane])) * as<i32>(b[lane])) : u64(as<u32>(a[lane])) * as<u32>(b[lane]));
        return Step::NEXT;
    }
    return by_integer(in, [&](auto zero) {
        using T = decltype(zero);
        return ternary<T>(warp, in, lanes, [&](T a, T b, T c) { return T(std::make_unsigned_t<T>(part(in, a, b)) + std::make_unsigned_t<T>(c)); });
    });
}

Step Machine::do_fma(Warp& warp, const Instruction& in, u32 lanes) {
    const Rounding rounding(in);
    if (in.type().bits == 64)
        return ternary<double>(warp, in, lanes, [](double a, double b, double c) { return std::fma(a, b, c); });
    if (in.type().letter != 'f') throw Fault("not emulated: " + in.mnemonic());
    if (paired(in))
        return ternary<u64>(warp, in, lanes, [&](u64 a, u64 b, u64 c) {
            return halves([&](float x, float y, float z) { return maybe_flushed(in, std::fma(x, y, z)); }, a, b, c);
        });
    const bool ftz = in.has("ftz");
    return ternary<float>(warp, in, lanes, [ftz](float a, float b, float c) {
        const float d = std::fma(a, b, c);
        return ftz ? flushed(d) : d;
    });
}

Step Machine::do_div(Warp& warp, const Instruction& in, u32 lanes) {
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [&](T a, T b) {
            if constexpr (is_float<T>) return maybe_flushed(in, T(a / b));
            else return b == 0 ? T(-1) : T(a / b);
        });
    });
}

Step Machine::do_rem(Warp& warp, const Instruction& in, u32 lanes) {
    return by_integer(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [](T a, T b) { return b == 0 ? a : T(a % b); });
    });
}

Step Machine::do_neg(Warp& warp, const Instruction& in, u32 lanes) {
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return unary<T>(warp, in, lanes, [](T a) { return T(-a); });
    });
}

Step Machine::do_abs(Warp& warp, const Instruction& in, u32 lanes) {
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return unary<T>(warp, in, lanes, [](T a) { return a < 0 || (is_float<T> && std::signbit(double(a))) ? T(-a) : a; });
    });
}

Step Machine::do_min(Warp& warp, const Instruction& in, u32 lanes) {
    const bool nan = in.has("NaN");
    if (in.operands.size() == 4 && in.type().letter == 'f')
        return ternary<float>(warp, in, lanes, [nan](float a, float b, float c) {
            return nan && (a != a || b != b || c != c) ? NAN : std::fmin(std::fmin(a, b), c);
        });
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [nan](T a, T b) {
            if constexpr (is_float<T>) return nan && (a != a || b != b) ? T(NAN) : std::fmin(a, b);
            else return std::min(a, b);
        });
    });
}

Step Machine::do_max(Warp& warp, const Instruction& in, u32 lanes) {
    const bool nan = in.has("NaN");
    if (in.operands.size() == 4 && in.type().letter == 'f')
        return ternary<float>(warp, in, lanes, [nan](float a, float b, float c) {
            return nan && (a != a || b != b || c != c) ? NAN : std::fmax(std::fmax(a, b), c);
        });
    return by_type(in, [&](auto zero) {
        using T = decltype(zero);
        return binary<T>(warp, in, lanes, [nan](T a, T b) {
            if constexpr (is_float<T>) return nan && (a != a || b != b) ? T(NAN) : std::fmax(a, b);
            else return std::max(a, b);
        });
    });
}

Step Machine::do_copysign(Warp& warp, const Instruction& in, u32 lanes) {
    return binary<float>(warp, in, lanes, [](float a, float b) { return std::copysign(b, a); });
}

Step Machine::do_ex2(Warp& warp, const Instruction& in, u32 lanes) {
    const bool ftz = in.has("ftz");
    return unary<float>(warp, in, lanes, [ftz](float a) { return ftz ? flushed(std::exp2(flushed(a))) : std::exp2(a); });
}

Step Machine::do_lg2(Warp& warp, const Instruction& in, u32 lanes) {
    const bool ftz = in.has("ftz");
    return unary<float>(warp, in, lanes, [ftz](float a) { return std::log2(ftz ? flushed(a) : a); });
}

Step Machine::do_rcp(Warp& warp, const Instruction& in, u32 lanes) {
    if (in.type().bits == 64) return unary<double>(warp, in, lanes, [](double a) { return 1.0 / a; });
    return unary<float>(warp, in, lanes, [&](float a) { return maybe_flushed(in, 1.0f / maybe_flushed(in, a)); });
}

Step Machine::do_sqrt(Warp& warp, const Instruction& in, u32 lanes) {
    const bool inverse = in.name == "rsqrt";
    return unary<float>(warp, in, lanes, [inverse](float a) { return inverse ? 1.0f / std::sqrt(a) : std::sqrt(a); });
}

// Bits ----------------------------------------------------------------------------------------------------------------------------

namespace {
enum class Logic { AND, OR, XOR };
u64 logic(Logic which, u64 a, u64 b) { return which == Logic::AND ? a & b : which == Logic::OR ? a | b : a ^ b; }
}  // namespace

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

// Choices -------------------------------------------------------------------------------------------------------------------------

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
        bool truth = false;
        switch (which) {
            case 0: truth = x == y; break;
            case 1: truth = x != y && !nan; break;
            case 2: truth = x < y; break;
            case 3: truth = x <= y; break;
            case 4: truth = x > y; break;
            case 5: truth = x >= y; break;
            case 6: truth = !nan; break;
            case 7: truth = nan; break;
        }
        result |= u32(truth || (unordered && nan)) << lane;
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
    // A vector of n - 1 parts, packed into or taken out of one register; which one it is, the parser says by a leading sink.
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
    } else {  // {d, e, ...} <- a, which comes last
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

// Conversion ----------------------------------------------------------------------------------------------------------------------

namespace {

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
    constexpr u64 WINDOW = 0x7F0000000000ull << 8;  // generic addresses of shared memory
    if (in.has("shared") && in.has("to")) return unary<u64>(warp, in, lanes, [](u64 a) { return a - WINDOW; });
    if (in.has("shared")) return unary<u64>(warp, in, lanes, [](u64 a) { return a + WINDOW; });
    return unary<u64>(warp, in, lanes, [](u64 a) { return a; });
}

}  // namespace ptx
