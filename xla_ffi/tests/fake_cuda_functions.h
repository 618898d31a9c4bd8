// What the files of FakeCuda share. For them only.
#pragma once

#include <cstdint>
#include <mutex>

#include "fake_cuda.h"

namespace ellm {

struct FakeCuda::Functions {
#define ELLM_DECLARE(member, symbol, parameters) static cu::ReturnCode member parameters;
  ELLM_CUDA_FUNCTIONS(ELLM_DECLARE)
#undef ELLM_DECLARE

  // Counts the call, and holds the lock for as long as it lives.
  class Call {
   public:
    explicit Call(const char* symbol)
        : fake(*the_fake_), fails(fake.faults_.next()), symbol_(symbol), lock_(fake.mutex_) {
      ++fake.calls_[symbol];
    }
    // For calls that need a context: its device, or -1.
    int device() const { return fake.current_device(symbol_); }
    // Whether a call that fails does a part of its work even so.
    bool half_done() const { return fake.faults_.half_done(); }

    FakeCuda& fake;
    const bool fails;

   private:
    const char* const symbol_;
    const std::lock_guard<std::mutex> lock_;
  };
};

namespace fake_cuda {

inline void* pointer(uintptr_t at) { return reinterpret_cast<void*>(at); }
inline uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

}  // namespace fake_cuda
}  // namespace ellm
