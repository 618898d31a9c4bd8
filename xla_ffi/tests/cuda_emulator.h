// Runs the CUDA kernels on the CPU: the functions of kernels/cuda/device.h with the meaning that
// the PTX manual gives them. A kernel's threads are fibers; a block is run at a time, and in it the
// thread that can go on. Copies to shared memory take place as early or as late as
// they may, and threads go on in one order or the other, as chosen. The products of warpgroups are
// in cuda_emulator_products.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_emulator_writes.h"
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
  SharedWrites::Landed landed;

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
  // How often all have met.
  uint64_t round() const { return round_; }

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
  std::vector<Copy> uncommitted = {};
  std::deque<std::vector<Copy>> groups = {};
  std::vector<SharedWrites::Landed> landed = {};  // not yet published to products
  // Of warpgroups, not waited for.
  std::vector<std::function<void()>> uncommitted_products = {};
  std::vector<std::function<void()>> products = {};
  bool may_multiply = false;  // begun, and no register of a product touched since
};

struct Block {
  int32_t index;
  int32_t grid;
  Timing timing;
  char* shared;
  SharedWrites writes;
  std::vector<Thread> threads = {};
  std::unique_ptr<Meeting> all = nullptr;
  std::vector<Meeting> warps = {};
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
// std::runtime_error where the threads of a block wait for each other for ever, or a thread ends
// before products of it.
inline void run(int64_t blocks, int32_t threads, int64_t shared_bytes, Timing timing,
                const std::function<void()>& body) {
  constexpr int64_t kAlignment = 1024;
  std::vector<char> memory(shared_bytes + kAlignment);
  char* shared = memory.data();
  while (reinterpret_cast<uintptr_t>(shared) % kAlignment != 0) ++shared;
  for (int64_t b = 0; b < blocks; ++b) {
    std::fill(memory.begin(), memory.end(), static_cast<char>(0xff));
    Block here = {static_cast<int32_t>(b), static_cast<int32_t>(blocks), timing, shared,
                  SharedWrites(shared_bytes)};
    for (int32_t t = 0; t < threads; ++t) here.threads.push_back({t});
    here.all = std::make_unique<Meeting>(threads);
    for (int32_t w = 0; w < threads / kWarpLanes; ++w) here.warps.emplace_back(kWarpLanes);
    block = &here;
    Fiber::run_all(threads, kWarpLanes, timing.backwards, body);
    block = nullptr;
    for (const Thread& thread : here.threads) {
      if (!thread.products.empty() || !thread.uncommitted_products.empty()) {
        throw std::runtime_error("a thread has ended before its products");
      }
    }
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
inline int32_t arrive(int32_t* counter) { return (*counter)++; }

struct FloatPair {
  float x;
  float y;
};
inline FloatPair load_from_others(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) {
    throw std::runtime_error("a load of two numbers is not aligned to 8 bytes");
  }
  FloatPair pair;
  std::memcpy(&pair, at, sizeof pair);
  return pair;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int32_t count_bits(uint32_t x) { return __builtin_popcount(x); }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    throw std::runtime_error("an asynchronous copy is not aligned to 16 bytes");
  }
  // Where nothing is to be read the address has to be good all the same: that hardware does not
  // look at it is promised nowhere. A fault here is one that a GPU might have.
  (void)*static_cast<const volatile char*>(global);
  const int64_t offset = static_cast<const char*>(shared) - emulator::block->shared;
  const emulator::Copy copy = {shared, global, valid, emulator::block->writes.start(offset)};
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
  emulator::Thread& self = emulator::self();
  while (self.groups.size() > kPending) {
    for (const emulator::Copy& copy : self.groups.front()) {
      if (emulator::block->timing.late_copies) copy.land();
      self.landed.push_back(copy.landed);
    }
    self.groups.pop_front();
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
      if (reinterpret_cast<uintptr_t>(at) % 16 != 0) {
        throw std::runtime_error("a row of a matrix is not aligned to 16 bytes");
      }
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

}  // namespace ellm::cuda
