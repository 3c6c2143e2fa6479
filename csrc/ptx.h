// PTX instructions without a C++ equivalent, one thin function each. Shared memory is addressed by 32-bit offsets.
#pragma once

#include "layout.h"

#ifdef EAPO_FP16
#define EAPO_TYPE "f16"
#else
#define EAPO_TYPE "bf16"
#endif

// Accumulators as operands of an asm statement.
#define EAPO_D4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define EAPO_D16(i) EAPO_D4(i), EAPO_D4((i) + 4), EAPO_D4((i) + 8), EAPO_D4((i) + 12)
#define EAPO_D64(i) EAPO_D16(i), EAPO_D16((i) + 16), EAPO_D16((i) + 32), EAPO_D16((i) + 48)

namespace eapo {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// A TMA descriptor (CUtensorMap): a kernel parameter that only the hardware reads.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// True in one thread of a converged warp, the same thread every time.
__device__ __forceinline__ bool elected() {
    u32 chosen;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xFFFFFFFF;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(chosen));
    return chosen != 0;
}

// Synchronize all threads of the cluster; their writes to shared memory become visible.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to TMA.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Waits for the completion of the phase of this parity; the hardware suspends the thread between polls.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\nbra again;\n"
        "ready:\n}"
        ::"r"(barrier), "r"(parity)
        : "memory");
}

// One arrival, which also announces the bytes that TMA will deliver in this phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival at the barrier of the same offset in CTA ``rank`` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
        ::"r"(barrier), "r"(rank)
        : "memory");
}

// Named barrier ``id`` of ``threads`` threads.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Load the box of the matrix at (column, row) into shared memory, 0 outside of the matrix. ``barrier`` counts its bytes.
__device__ __forceinline__ void box_load(u32 to, const TensorMap* map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same, to the same address in every CTA of the bit mask ``ranks``; the barrier of each counts the bytes that arrive there.
__device__ __forceinline__ void box_load_to_all(u32 to, const TensorMap* map, u32 barrier, int column, int row, u16 ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
        : "memory");
}

// Store a box of shared memory to the matrix at (column, row); nothing is written outside of the matrix.
__device__ __forceinline__ void box_store(const TensorMap* map, u32 from, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
        "cp.async.bulk.commit_group;"
        ::"l"(map), "r"(from), "r"(column), "r"(row)
        : "memory");
}

// Wait until at most ``PENDING`` of this thread's stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void box_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Make this thread's writes to shared memory visible to TMA.
__device__ __forceinline__ void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Store four 8x8 matrices of half-precision numbers, one register each, to the rows that the lanes address.
__device__ __forceinline__ void matrices_store(u32 row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// Two fp32 numbers rounded to nearest bf16, ``low`` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The same in fp16; the largest finite value is 65504.
__device__ __forceinline__ u32 pack_fp16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float(u32(bits) << 16); }

__device__ __forceinline__ float from_fp16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma: D[64, BLOCK_V] += A[64, 16] @ B[BLOCK_V, 16].T, operands in shared memory, fp32 accumulators in registers ----

// Before the first wgmma that uses registers written by other instructions.
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most ``PENDING`` committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from reading accumulators before the wait, which it does not know to write them.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
    EAPO_UNROLL
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d: the BLOCK_V / 2 accumulators of this thread. a, b: operand descriptors. accumulate: 0 overwrites d.
template <int BLOCK_V>
__device__ void multiply(float* d, u64 a, u64 b, int accumulate);

template <>
__device__ __forceinline__ void multiply<128>(float* d, u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." EAPO_TYPE "." EAPO_TYPE " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}\n"
        : EAPO_D64(0)
        : "l"(a), "l"(b), "r"(accumulate));
}

template <>
__device__ __forceinline__ void multiply<256>(float* d, u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." EAPO_TYPE "." EAPO_TYPE " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
        " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
        " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"
        " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"
        " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, 0, 0;\n}\n"
        : EAPO_D64(0), EAPO_D64(64)
        : "l"(a), "l"(b), "r"(accumulate));
}

}  // namespace eapo
