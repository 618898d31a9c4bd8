// What the kernels ask of a GPU: indices, barriers, warp exchanges, asynchronous copies and tensor
// cores, as functions. The kernels use nothing else, so the tests run them on the CPU over a second
// set of these functions (tests/cuda_emulator.h).
#pragma once

#include "kernels/cuda/host_device.h"

#if !defined(__CUDACC__)
#include "tests/cuda_emulator.h"
#else

#define ELLM_KERNEL __global__
#define ELLM_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define ELLM_DEVICE __device__ __forceinline__
#define ELLM_UNROLL _Pragma("unroll")
#define ELLM_NO_UNROLL _Pragma("unroll 1")

namespace ellm::cuda {

extern __shared__ __align__(1024) unsigned char shared_bytes[];

ELLM_DEVICE int32_t thread_index() { return static_cast<int32_t>(threadIdx.x); }
ELLM_DEVICE int32_t block_index() { return static_cast<int32_t>(blockIdx.x); }
ELLM_DEVICE int32_t grid_blocks() { return static_cast<int32_t>(gridDim.x); }
// Dynamic shared memory of the block, aligned to 1024 bytes.
ELLM_DEVICE char* shared_memory() { return reinterpret_cast<char*>(shared_bytes); }

ELLM_DEVICE void sync_block() { __syncthreads(); }
ELLM_DEVICE void sync_warp() { __syncwarp(); }

// All lanes of a warp take part in these.
template <class T>
ELLM_DEVICE T shuffle(T value, int32_t lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
ELLM_DEVICE T shuffle_xor(T value, int32_t mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
ELLM_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

ELLM_DEVICE int32_t take(int32_t* counter) { return atomicAdd(counter, 1); }

// Counts a block in, and returns how many were before it; one thread calls this, between two
// barriers of its block. What a block wrote before its first barrier is there for a block that is
// counted later, after its second one.
ELLM_DEVICE int32_t arrive(int32_t* counter) {
  __threadfence();
  const int32_t before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}

struct FloatPair {
  float x;
  float y;
};
// Two numbers, aligned to 8 bytes, that other blocks wrote while this one ran: never from the cache
// of this multiprocessor.
ELLM_DEVICE FloatPair load_from_others(const void* at) {
  const float2 pair = __ldcg(static_cast<const float2*>(at));
  return {pair.x, pair.y};
}

ELLM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ELLM_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
ELLM_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ELLM_DEVICE int32_t count_bits(uint32_t x) { return __popc(x); }

ELLM_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Starts a copy of 16 bytes to shared memory; zeros where `valid` is false, and then nothing is
// read. Done after the wait_copies() that covers the commit_copies() behind it.
ELLM_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                 "r"(valid ? 16 : 0)
               : "memory");
}
ELLM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's commits are not done.
template <int kPending>
ELLM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 2-byte elements from shared memory; lane 8 i + j gives the address of row j
// of matrix i (16 bytes). A lane gets elements (lane / 4, 2 (lane % 4)) and the next of each.
ELLM_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, but a lane gets elements (2 (lane % 4), lane / 4) and the one below.
ELLM_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The element types of the tensor core kernels.
struct BFloat16 {
  // Two values, rounded to nearest; `low` in the lower half.
  static ELLM_DEVICE uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static ELLM_DEVICE float widen(uint16_t x) {
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
  }
  // d += a * b: d [16, 8], a [16, 16], b [16, 8], as fragments of a warp.
  static ELLM_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static ELLM_DEVICE uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static ELLM_DEVICE float widen(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  static ELLM_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace ellm::cuda

#endif  // __CUDACC__
