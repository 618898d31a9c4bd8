// What the kernel tests share: the instruction sets of this machine, seeded values, bfloat16 in
// plain arithmetic, and a ParallelFor of real threads.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

inline std::vector<const Kernels*> machine_kernels() {
  std::vector<const Kernels*> found;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_bf16"}) {
    if (const Kernels* k = kernels_for(isa)) found.push_back(k);
  }
  return found;
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bf16(uint16_t x) { return bits_to_float(uint32_t{x} << 16); }

// The nearest bfloat16, found by comparing distances to both neighbours; ties go to the even one.
inline uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t below = static_cast<uint16_t>(bits >> 16);  // towards zero
  if (std::isnan(x)) return below | 0x40;
  if (std::isinf(x)) return below;
  const uint16_t above = below + 1;  // away from zero; may be infinity, which stands for 2^128
  const double far =
      std::isinf(from_bf16(above)) ? std::ldexp(1.0, 128) : std::fabs(double{from_bf16(above)});
  const double up = far - std::fabs(double{x});
  const double down = std::fabs(double{x}) - std::fabs(double{from_bf16(below)});
  if (up != down) return up < down ? above : below;
  return below % 2 == 0 ? below : above;
}

// Elements of either type behind one interface.
class Elements {
 public:
  Elements() = default;
  // Filled with a NaN whose bits are all ones.
  Elements(ElementType type, size_t count)
      : type_(type), bytes_(count * element_bytes(type), static_cast<char>(0xff)) {}

  float get(size_t i) const {
    if (type_ == ElementType::kFloat32) {
      float x;
      std::memcpy(&x, bytes_.data() + i * 4, 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, bytes_.data() + i * 2, 2);
    return from_bf16(x);
  }

  void set(size_t i, float x) {
    if (type_ == ElementType::kFloat32) {
      std::memcpy(bytes_.data() + i * 4, &x, 4);
    } else {
      const uint16_t h = nearest_bf16(x);
      std::memcpy(bytes_.data() + i * 2, &h, 2);
    }
  }

  size_t size() const { return bytes_.size() / element_bytes(type_); }
  const char* at(size_t i) const { return bytes_.data() + i * element_bytes(type_); }
  char* at(size_t i) { return bytes_.data() + i * element_bytes(type_); }

  void copy(size_t to, const Elements& from, size_t begin, size_t count) {
    std::memcpy(at(to), from.at(begin), count * element_bytes(type_));
  }
  bool same(size_t i, const Elements& other, size_t j, size_t count) const {
    return std::memcmp(at(i), other.at(j), count * element_bytes(type_)) == 0;
  }

 private:
  ElementType type_ = ElementType::kFloat32;
  std::vector<char> bytes_;
};

inline Elements random_elements(ElementType type, size_t count, std::mt19937_64* random,
                                float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  Elements e(type, count);
  for (size_t i = 0; i < count; ++i) e.set(i, normal(*random));
  return e;
}

// Units taken by `threads` threads from the last to the first.
inline ParallelFor threaded(int threads) {
  return [threads](int64_t units, const std::function<void(int64_t)>& body) {
    std::atomic<int64_t> left{units};
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&] {
        for (int64_t i = left.fetch_sub(1) - 1; i >= 0; i = left.fetch_sub(1) - 1) body(i);
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
}

inline const char* type_name(ElementType type) {
  return type == ElementType::kFloat32 ? "float32" : "bfloat16";
}

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBFloat16};

}  // namespace ellm
