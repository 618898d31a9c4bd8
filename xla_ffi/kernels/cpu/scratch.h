// Working memory of a kernel call, one buffer per thread, kept for the next call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ellm {

class Scratch {
 public:
  // At least `count` floats, 64-byte aligned, contents undefined; valid until the next call on
  // this thread.
  static float* floats(int64_t count) {
    thread_local Scratch scratch;
    if (count > scratch.count_) {
      scratch.data_.reset();
      scratch.count_ = 0;
      scratch.data_.reset(static_cast<float*>(
          ::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
      scratch.count_ = count;
    }
    return scratch.data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t count_ = 0;
};

}  // namespace ellm
