// Values: a register holds 64 bits, an instruction reads as many as its type has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = 0xFFFFFFFFu;

// The kernel did something that the hardware forbids or leaves undefined, or that is not emulated.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class T>
T as(u64 bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
u64 bits_of(T value) {
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// bf16 and fp16 values are held as their bits.
inline float from_bf16(u16 bits) { return as<float>(u64(bits) << 16); }
inline u16 to_bf16(float x) {
    u32 b = u32(bits_of(x));
    if (std::isnan(x)) return 0x7FFF;
    return u16((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
inline float from_fp16(u16 bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x = exponent == 0    ? std::ldexp(float(mantissa), -24)
              : exponent == 31 ? (mantissa ? std::nanf("") : HUGE_VALF)
                               : std::ldexp(float(1024 + mantissa), exponent - 25);
    return bits >> 15 ? -x : x;
}
inline u16 to_fp16(float x) {
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7FFF;
    x = std::fabs(x);
    if (x >= 65520.0f) return sign | 0x7C00;
    if (x < std::ldexp(1.0f, -14)) return sign | u16(std::nearbyint(std::ldexp(x, 24)));  // nearbyint rounds ties to even
    int exponent;
    std::frexp(x, &exponent);
    const int mantissa = int(std::nearbyint(std::ldexp(x, 11 - exponent)));  // 1024 ... 2048
    return sign | u16(((exponent + 14) << 10) + (mantissa - 1024));
}

}  // namespace ptx
