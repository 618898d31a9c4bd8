// Runs the CUDA kernels on the CPU: the functions of kernels/cuda/device.h with the meaning that
// the PTX manual gives them. A kernel's threads are fibers; a block is run at a time, and in it the
// thread that can go on. Copies to shared memory take place as early or as late as
// they may, and threads go on in one order or the other, as chosen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "fiber.h"

#define ELLM_KERNEL inline
#define ELLM_LAUNCH_BOUNDS(threads, blocks)
#define ELLM_DEVICE inline
#define ELLM_UNROLL
#define ELLM_NO_UNROLL

namespace ellm::cuda {

namespace emulator {

constexpr int32_t kWarpLanes = 32;
constexpr size_t kPayloadBytes = 64;

// What a GPU may do in one way or another; correct kernels do not depend on it.
struct Timing {
  // Asynchronous copies take place when they are waited for, or else when they are started.
  bool late_copies = true;
  // The last warp runs ahead of the others as far as barriers let it, or else the first.
  bool backwards = false;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;

  void land() const {
    if (valid) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

// Where a number of threads meet and show each other a value.
class Meeting {
 public:
  explicit Meeting(int32_t size) : size_(size), arriving_(size), shown_(size) {}

  // Returns when all have come; what they brought stays until they all come again.
  template <class T>
  const Meeting& show(int32_t place, const T& value) {
    static_assert(sizeof(T) <= kPayloadBytes);
    std::memcpy(arriving_[place].bytes, &value, sizeof(T));
    const uint64_t round = round_;
    if (++arrived_ == size_) open();
    while (round_ == round) Fiber::yield();
    return *this;
  }
  template <class T>
  T shown(int32_t place) const {
    T value;
    std::memcpy(&value, shown_[place].bytes, sizeof(T));
    return value;
  }

 private:
  struct Payload {
    alignas(16) unsigned char bytes[kPayloadBytes];
  };

  void open() {
    shown_.swap(arriving_);
    arrived_ = 0;
    ++round_;
    Fiber::note_progress();
  }

  int32_t size_;
  int32_t arrived_ = 0;
  uint64_t round_ = 0;
  std::vector<Payload> arriving_;
  std::vector<Payload> shown_;
};

struct Thread {
  int32_t index;
  std::vector<std::function<void()>> products;  // of warpgroups, not waited for
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  int32_t index;
  int32_t grid;
  Timing timing;
  char* shared;
  std::vector<Thread> threads;
  std::unique_ptr<Meeting> all;
  std::vector<Meeting> warps;
};

inline Block* block = nullptr;

inline Thread& self() { return block->threads[Fiber::current()]; }
inline int32_t lane() { return self().index % kWarpLanes; }

// What every lane of the warp brings.
template <class T>
const Meeting& warp_show(const T& value) {
  return block->warps[self().index / kWarpLanes].show(lane(), value);
}

// Runs `body` for every thread of every block. Shared memory begins as NaN. Throws
// std::runtime_error where the threads of a block wait for each other for ever.
inline void run(int64_t blocks, int32_t threads, int64_t shared_bytes, Timing timing,
                const std::function<void()>& body) {
  constexpr int64_t kAlignment = 1024;
  std::vector<char> memory(shared_bytes + kAlignment);
  char* shared = memory.data();
  while (reinterpret_cast<uintptr_t>(shared) % kAlignment != 0) ++shared;
  for (int64_t b = 0; b < blocks; ++b) {
    std::memset(shared, 0xff, shared_bytes);
    Block here = {
        static_cast<int32_t>(b), static_cast<int32_t>(blocks), timing, shared, {}, {}, {}};
    for (int32_t t = 0; t < threads; ++t) here.threads.push_back({t, {}, {}, {}});
    here.all = std::make_unique<Meeting>(threads);
    for (int32_t w = 0; w < threads / kWarpLanes; ++w) here.warps.emplace_back(kWarpLanes);
    block = &here;
    Fiber::run_all(threads, kWarpLanes, timing.backwards, body);
    block = nullptr;
  }
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

inline uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  // A unit in the last place of the result; subnormals share the smallest one.
  const int unit = std::max(exponent - 11, -24);
  const auto count = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  const uint32_t bits = unit == -24 ? count : (static_cast<uint32_t>(unit + 24) << 10) + count;
  return static_cast<uint16_t>(sign | bits);
}

inline float brain_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline uint16_t float_to_brain(float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

}  // namespace emulator

inline int32_t thread_index() { return emulator::self().index; }
inline int32_t block_index() { return emulator::block->index; }
inline int32_t grid_blocks() { return emulator::block->grid; }
inline char* shared_memory() { return emulator::block->shared; }

inline void sync_block() { emulator::block->all->show(thread_index(), 0); }
inline void sync_warp() { emulator::warp_show(0); }

template <class T>
T shuffle(T value, int32_t lane) {
  return emulator::warp_show(value).template shown<T>(lane);
}
template <class T>
T shuffle_xor(T value, int32_t mask) {
  return shuffle(value, emulator::lane() ^ mask);
}
inline uint32_t ballot(bool vote) {
  const emulator::Meeting& votes = emulator::warp_show(vote);
  uint32_t bits = 0;
  for (int32_t i = 0; i < emulator::kWarpLanes; ++i) {
    bits |= uint32_t{votes.shown<bool>(i)} << i;
  }
  return bits;
}

inline int32_t take(int32_t* counter) { return (*counter)++; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int32_t count_bits(uint32_t x) { return __builtin_popcount(x); }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    throw std::runtime_error("an asynchronous copy is not aligned to 16 bytes");
  }
  const emulator::Copy copy = {shared, global, valid};
  if (!emulator::block->timing.late_copies) copy.land();
  emulator::self().uncommitted.push_back(copy);
}
inline void commit_copies() {
  emulator::Thread& self = emulator::self();
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}
template <int kPending>
void wait_copies() {
  auto& groups = emulator::self().groups;
  while (groups.size() > kPending) {
    if (emulator::block->timing.late_copies) {
      for (const emulator::Copy& copy : groups.front()) copy.land();
    }
    groups.pop_front();
  }
}

namespace emulator {

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  const Meeting& rows = warp_show(row);
  const int32_t major = lane() / 4;
  const int32_t minor = lane() % 4 * 2;
  for (int32_t matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t r = transposed ? minor + i : major;
      const int32_t c = transposed ? major : minor + i;
      const auto* at = static_cast<const char*>(rows.shown<const void*>(8 * matrix + r));
      std::memcpy(&pair[i], at + 2 * c, sizeof pair[i]);
    }
    to[matrix] = uint32_t{pair[1]} << 16 | pair[0];
  }
}

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         float (*widen)(uint16_t)) {
  Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Meeting& all = warp_show(mine);
  const auto half = [&](uint32_t word, int32_t i) {
    return widen(static_cast<uint16_t>(i == 0 ? word : word >> 16));
  };
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t row = lane() / 4 + i / 2 * 8;
    const int32_t column = lane() % 4 * 2 + i % 2;
    for (int32_t k = 0; k < 16; ++k) {
      const auto left = all.shown<Operands>(row % 8 * 4 + k % 8 / 2);
      const auto right = all.shown<Operands>(column * 4 + k % 8 / 2);
      d[i] += half(left.a[row / 8 + k / 8 * 2], k % 2) * half(right.b[k / 8], k % 2);
    }
  }
}

}  // namespace emulator

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::load_matrices(to, row, false);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulator::load_matrices(to, row, true);
}

struct BFloat16 {
  static uint32_t pack(float low, float high) {
    return uint32_t{emulator::float_to_brain(high)} << 16 | emulator::float_to_brain(low);
  }
  static float widen(uint16_t x) { return emulator::brain_to_float(x); }
  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_add(d, a, b0, b1, widen);
  }
};

struct Float16 {
  static uint32_t pack(float low, float high) {
    return uint32_t{emulator::float_to_half(high)} << 16 | emulator::float_to_half(low);
  }
  static float widen(uint16_t x) { return emulator::half_to_float(x); }
  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_add(d, a, b0, b1, widen);
  }
};

// Products of warpgroups: carried out when they are waited for, from what lies in shared memory
// then.
inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const char*>(at) - emulator::block->shared);
}
inline void publish_to_products() {}
inline void begin_products() {}
inline void commit_products() {}
inline void wait_products() {
  auto& products = emulator::self().products;
  for (const auto& product : products) product();
  products.clear();
  sync_warp();
}
template <class T, int32_t kTiles>
void settle(T (&)[kTiles][4]) {}

namespace emulator {

// Element (major, minor) of the tile of 16-byte vectors that a descriptor names: minor elements
// follow each other, majors are 128 bytes apart; the vectors of a row are permuted by the address.
inline uint16_t tile_element(uint64_t tile, int32_t major, int32_t minor) {
  if (tile >> 62 != 1) throw std::runtime_error("the tile is not described as 128-byte swizzled");
  const auto start = static_cast<uint32_t>(tile & 0x3fff) << 4;
  const auto group_bytes = static_cast<uint32_t>(tile >> 16 & 0x3fff) << 4;
  const auto eight_bytes = static_cast<uint32_t>(tile >> 32 & 0x3fff) << 4;
  const uint32_t linear =
      start + major / 8 * eight_bytes + major % 8 * 128 + minor / 64 * group_bytes + minor % 64 * 2;
  const uint32_t swizzled = linear ^ ((linear >> 7 & 7) << 4);
  uint16_t bits;
  std::memcpy(&bits, block->shared + swizzled, sizeof bits);
  return bits;
}

// Row and column of accumulator `i` of column tile `j` in this lane's warpgroup.
inline int32_t product_row(int32_t i) {
  return self().index / kWarpLanes % 4 * 16 + lane() / 4 + i / 2 * 8;
}
inline int32_t product_column(int32_t j, int32_t i) { return 8 * j + lane() % 4 * 2 + i % 2; }

}  // namespace emulator

template <class E, int32_t kTiles>
void multiply_tiles(E, float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::self().products.push_back([&d, a, b, accumulate] {
    for (int32_t j = 0; j < kTiles; ++j) {
      for (int32_t i = 0; i < 4; ++i) {
        float sum = accumulate ? d[j][i] : 0.0f;
        for (int32_t k = 0; k < 16; ++k) {
          sum += E::widen(emulator::tile_element(a, emulator::product_row(i), k)) *
                 E::widen(emulator::tile_element(b, emulator::product_column(j, i), k));
        }
        d[j][i] = sum;
      }
    }
  });
}

template <class E, int32_t kTiles>
void multiply_with_tile(E, float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  const emulator::Operands mine = {{a[0], a[1], a[2], a[3]}, {}};
  const emulator::Meeting& all = emulator::warp_show(mine);
  std::vector<emulator::Operands> left;  // of the lanes that share a row with this one
  for (int32_t i = 0; i < 4; ++i) {
    left.push_back(all.shown<emulator::Operands>(emulator::lane() / 4 * 4 + i));
  }
  emulator::self().products.push_back([&d, left, b] {
    for (int32_t j = 0; j < kTiles; ++j) {
      for (int32_t i = 0; i < 4; ++i) {
        for (int32_t k = 0; k < 16; ++k) {
          const uint32_t word = left[k % 8 / 2].a[i / 2 + k / 8 * 2];
          const auto bits = static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16);
          d[j][i] += E::widen(bits) *
                     E::widen(emulator::tile_element(b, k, emulator::product_column(j, i)));
        }
      }
    }
  });
}

}  // namespace ellm::cuda
