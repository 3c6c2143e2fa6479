// Arithmetic of single threads.
#include <cfenv>

#include "lanes.h"

namespace ptx {

namespace {

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;

// Sets the rounding mode until the end of the scope. Operands and results are in memory that the compiler must assume the calls to access,
// so no arithmetic moves out of the scope.
struct Rounding {
    explicit Rounding(const Instruction& in) {
        std::fesetround(in.has("rz") ? FE_TOWARDZERO : in.has("rm") ? FE_DOWNWARD : in.has("rp") ? FE_UPWARD : FE_TONEAREST);
    }
    ~Rounding() { std::fesetround(FE_TONEAREST); }
};


template <class T>
T maybe_flushed(const Instruction& in, T x) {
    if constexpr (std::is_same_v<T, float>) {
        static const std::string ftz = "ftz";
        return in.words.count(ftz) ? flushed(x) : x;
    } else {
        return x;
    }
}

// f32x2: the same function of the lower and of the upper halves.
template <class F>
u64 halves(F f, u64 a, u64 b, u64 c = 0) {
    const auto half = [](u64 x, int i) { return as<float>(x >> (32 * i) & 0xFFFFFFFF); };
    return bits_of(f(half(a, 0), half(b, 0), half(c, 0))) | bits_of(f(half(a, 1), half(b, 1), half(c, 1))) << 32;
}
bool paired(const Instruction& in) { return in.type().packed == 2 && in.type().letter == 'f'; }

}  // namespace

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
// The full product of two integers.
template <class T>
__int128 wide_product(T a, T b) { return __int128(a) * __int128(b); }
template <class T>
T part(const Instruction& in, T a, T b) {
    const auto product = wide_product(a, b);
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

Step Machine::do_min_max(Warp& warp, const Instruction& in, u32 lanes) {
    const bool nan = in.has("NaN"), largest = in.name == "max";
    const auto pick = [nan, largest](auto a, auto b) -> decltype(a) {
        if constexpr (is_float<decltype(a)>) {
            if (nan && (a != a || b != b)) return NAN;
            return largest ? std::fmax(a, b) : std::fmin(a, b);
        } else {
            return largest ? std::max(a, b) : std::min(a, b);
        }
    };
    if (in.operands.size() == 4 && in.type().letter == 'f')
        return ternary<float>(warp, in, lanes, [&](float a, float b, float c) { return pick(pick(a, b), c); });
    return by_type(in, [&](auto zero) { return binary<decltype(zero)>(warp, in, lanes, pick); });
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

}  // namespace ptx
