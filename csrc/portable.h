// What headers shared by device and host code need from NVRTC and from g++. The kernels include only headers of this folder, so NVRTC
// needs no CUDA headers on the user's machine.
#pragma once

#ifdef __CUDACC__
#define EAPO_SHARED __host__ __device__ __forceinline__
#define EAPO_UNROLL _Pragma("unroll")
#define EAPO_ROLLED _Pragma("unroll 1")
#else
#include <math.h>
#define EAPO_SHARED inline
#define EAPO_UNROLL
#define EAPO_ROLLED
#endif

namespace eapo {

// 2^x. On the device one MUFU instruction: 2 ulp, 0 for x < -126 (subnormal results are flushed).
EAPO_SHARED float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// a * b + c, rounded once.
EAPO_SHARED float fma_exact(float a, float b, float c) { return fmaf(a, b, c); }

// The larger of two numbers; NaN is ignored.
EAPO_SHARED float larger(float a, float b) { return fmaxf(a, b); }

EAPO_SHARED float infinite() {
#ifdef __CUDA_ARCH__
    return __int_as_float(0x7F800000);
#else
    return HUGE_VALF;
#endif
}

EAPO_SHARED float not_a_number() {
#ifdef __CUDA_ARCH__
    return __int_as_float(0x7FC00000);
#else
    return NAN;
#endif
}

EAPO_SHARED int smaller(int a, int b) { return a < b ? a : b; }

EAPO_SHARED int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace eapo
