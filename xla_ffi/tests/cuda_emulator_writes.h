// What the products of warpgroups may read of a block's shared memory. They read it by another way
// than ordinary loads: what a thread has copied there is theirs only after it has waited for the
// copy, then said so (a fence), and then all threads have met at a barrier.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace ellm::cuda::emulator {

class SharedWrites {
 public:
  static constexpr int64_t kVectorBytes = 16;

  // One copy of a vector. A later one to the same place makes it void.
  struct Landed {
    int64_t vector;
    uint32_t copy;
  };

  explicit SharedWrites(int64_t shared_bytes) : vectors_(shared_bytes / kVectorBytes + 1) {}

  // A copy to `offset` begins: nobody may read there.
  Landed start(int64_t offset) {
    const int64_t at = offset / kVectorBytes;
    Vector& vector = vectors_.at(at);
    vector.readable_from = kNever;
    return {at, ++vector.copy};
  }
  // A thread publishes its copy after `barriers` of the block; the next makes it readable.
  void publish(const Landed& landed, uint64_t barriers) {
    Vector& vector = vectors_[landed.vector];
    if (vector.copy == landed.copy) vector.readable_from = barriers + 1;
  }
  // Throws std::runtime_error unless a product may read at `offset` after so many barriers.
  void check(int64_t offset, uint64_t barriers) const {
    if (vectors_.at(offset / kVectorBytes).readable_from > barriers) {
      throw std::runtime_error(
          "a product reads shared memory that was not copied, waited for, published and then "
          "followed by a barrier");
    }
  }

 private:
  static constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();

  struct Vector {
    uint64_t readable_from = kNever;
    uint32_t copy = 0;
  };

  std::vector<Vector> vectors_;
};

}  // namespace ellm::cuda::emulator
