// Products of a warpgroup (four warps) on the tensor cores of compute capability 9.0, straight from
// shared memory. Compiled for sm_90a; elsewhere the functions are there and must not be called.
#pragma once

#include "kernels/cuda/device.h"

#if !defined(__CUDACC__)
#include "tests/cuda_emulator_products.h"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Code for sm_90 would run on a Hopper without its products: compile for sm_90a instead."
#endif

namespace ellm::cuda {

// How tiles of 2-byte elements lie in shared memory for these products: columns in groups of 64,
// one after the other; in a group, rows of 128 bytes, of which the 16-byte vectors are permuted by
// the row ("128-byte swizzle"). A tile begins at a multiple of 1024 bytes.
constexpr int32_t kSwizzledRowBytes = 128;
constexpr int32_t kSwizzledColumns = kSwizzledRowBytes / 2;

// From the tile's begin to a vector of 8 elements; the tile has `rows` rows.
ELLM_HOST_DEVICE int32_t swizzled_offset(int32_t rows, int32_t row, int32_t vector) {
  const int32_t group = vector / 8;
  return (group * rows + row) * kSwizzledRowBytes + ((vector % 8) ^ (row % 8)) * 16;
}

// Describes such a tile to a product (PTX manual, "Matrix descriptor format" of wgmma):
// `group_bytes` from one group of 64 columns to the next; 1024 bytes from 8 rows to the next 8.
ELLM_HOST_DEVICE uint64_t describe_tile(uint32_t shared_address, uint32_t group_bytes) {
  constexpr uint64_t kEightRows = 1024;
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>(shared_address >> 4 & 0x3fff) |
         static_cast<uint64_t>(group_bytes >> 4 & 0x3fff) << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}
// The same tile, `bytes` further on.
ELLM_HOST_DEVICE uint64_t advance(uint64_t tile, int32_t bytes) {
  return tile + static_cast<uint64_t>(bytes >> 4);
}

#if defined(__CUDACC__)

// Whatever is computed of these registers before this stands before it, and what comes after stands
// after: compilers know nothing of products that are still running.
template <int32_t kTiles>
ELLM_DEVICE void settle(float (&registers)[kTiles][4]) {
  ELLM_UNROLL
  for (int32_t j = 0; j < kTiles; ++j) {
    ELLM_UNROLL
    for (int32_t i = 0; i < 4; ++i) asm volatile("" : "+f"(registers[j][i])::"memory");
  }
}
template <int32_t kTiles>
ELLM_DEVICE void settle(uint32_t (&registers)[kTiles][4]) {
  ELLM_UNROLL
  for (int32_t j = 0; j < kTiles; ++j) {
    ELLM_UNROLL
    for (int32_t i = 0; i < 4; ++i) asm volatile("" : "+r"(registers[j][i])::"memory");
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What ordinary stores and copies of this thread put into shared memory is seen by the products
// that follow a barrier.
ELLM_DEVICE void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Before the first product, and after touching its registers.
ELLM_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ELLM_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until then the accumulators of what was committed must not be touched.
ELLM_DEVICE void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define ELLM_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ELLM_32(d)                                                                    \
  ELLM_4(d, 0), ELLM_4(d, 1), ELLM_4(d, 2), ELLM_4(d, 3), ELLM_4(d, 4), ELLM_4(d, 5), \
      ELLM_4(d, 6), ELLM_4(d, 7)
#define ELLM_64(d)                                                                     \
  ELLM_32(d), ELLM_4(d, 8), ELLM_4(d, 9), ELLM_4(d, 10), ELLM_4(d, 11), ELLM_4(d, 12), \
      ELLM_4(d, 13), ELLM_4(d, 14), ELLM_4(d, 15)
#define ELLM_REGISTERS_32                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define ELLM_REGISTERS_64                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

// d = (accumulate ? d : 0) + a * b with a [64, 16] and b [16, 128], both with contiguous k.
#define ELLM_PRODUCT_OF_TILES(type)                                                      \
  asm volatile(                                                                          \
      "{.reg .pred p; setp.ne.b32 p, %66, 0;"                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " ELLM_REGISTERS_64 \
      ", %64, %65, p, 1, 1, 0, 0;}"                                                      \
      : ELLM_64(d)                                                                       \
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))
// d += a * b with a [64, 16] in registers and b [16, 64 or 128], whose rows are contiguous.
#define ELLM_PRODUCT_WITH_TILE_64(type)                                                 \
  asm volatile(                                                                         \
      "{.reg .pred p; setp.eq.b32 p, 0, 0;"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " ELLM_REGISTERS_32 \
      ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"                                       \
      : ELLM_32(d)                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define ELLM_PRODUCT_WITH_TILE_128(type)                                                 \
  asm volatile(                                                                          \
      "{.reg .pred p; setp.eq.b32 p, 0, 0;"                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " ELLM_REGISTERS_64 \
      ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"                                        \
      : ELLM_64(d)                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

ELLM_DEVICE void multiply_tiles(BFloat16, float (&d)[16][4], uint64_t a, uint64_t b,
                                bool accumulate) {
  ELLM_PRODUCT_OF_TILES("bf16");
}
ELLM_DEVICE void multiply_tiles(Float16, float (&d)[16][4], uint64_t a, uint64_t b,
                                bool accumulate) {
  ELLM_PRODUCT_OF_TILES("f16");
}
ELLM_DEVICE void multiply_with_tile(BFloat16, float (&d)[8][4], const uint32_t (&a)[4],
                                    uint64_t b) {
  ELLM_PRODUCT_WITH_TILE_64("bf16");
}
ELLM_DEVICE void multiply_with_tile(Float16, float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  ELLM_PRODUCT_WITH_TILE_64("f16");
}
ELLM_DEVICE void multiply_with_tile(BFloat16, float (&d)[16][4], const uint32_t (&a)[4],
                                    uint64_t b) {
  ELLM_PRODUCT_WITH_TILE_128("bf16");
}
ELLM_DEVICE void multiply_with_tile(Float16, float (&d)[16][4], const uint32_t (&a)[4],
                                    uint64_t b) {
  ELLM_PRODUCT_WITH_TILE_128("f16");
}

#else

ELLM_DEVICE void publish_to_products() {}
ELLM_DEVICE void begin_products() {}
ELLM_DEVICE void commit_products() {}
ELLM_DEVICE void wait_products() {}
template <class E, int32_t kTiles>
ELLM_DEVICE void multiply_tiles(E, float (&)[kTiles][4], uint64_t, uint64_t, bool) {
  __trap();
}
template <class E, int32_t kTiles>
ELLM_DEVICE void multiply_with_tile(E, float (&)[kTiles][4], const uint32_t (&)[4], uint64_t) {
  __trap();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL
#endif  // __CUDACC__

}  // namespace ellm::cuda
