// XLA's intra-op threads as a kernel's ParallelFor: no second pool competes for the cores.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "ffi/spin.h"
#include "kernels/cpu/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

// The calling thread works too, and returns when every unit is done. A helper that the pool starts
// late finds nothing left and touches only the shared state, so no wait depends on a free thread.
class XlaParallel {
 public:
  explicit XlaParallel(xla::ffi::ThreadPool pool) : pool_(pool) {
    num_threads_ = std::max<int64_t>(1, pool_.num_threads());
  }

  int64_t num_threads() const { return num_threads_; }

  void operator()(int64_t units, const std::function<void(int64_t)>& body) {
    const int64_t helpers = std::min(num_threads_, units) - 1;
    if (helpers <= 0) {
      run_serially(units, body);
      return;
    }
    auto work = std::make_shared<Work>();
    work->units = units;
    work->body = &body;
    for (int64_t i = 0; i < helpers; ++i) {
      pool_.Schedule([work] { work->run(); });
    }
    work->run();
    const auto all_done = [&] { return work->done.load(std::memory_order_acquire) == units; };
    if (spin_until(all_done, kSpin)) return;
    std::unique_lock<std::mutex> lock(work->mutex);
    work->all_done.wait(lock, all_done);
  }

 private:
  // The last units of a call end within microseconds of one another; to sleep and be woken takes
  // some tens of them, as long as one row's linear layer.
  static constexpr std::chrono::microseconds kSpin{200};

  struct Work {
    std::atomic<int64_t> next{0};
    int64_t units = 0;
    const std::function<void(int64_t)>* body = nullptr;  // valid while a unit is left
    std::mutex mutex;
    std::condition_variable all_done;
    std::atomic<int64_t> done{0};

    void run() {
      int64_t finished = 0;
      for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) {
        (*body)(i);
        ++finished;
      }
      if (finished == 0) return;
      if (done.fetch_add(finished, std::memory_order_acq_rel) + finished < units) return;
      // Under the mutex, or a caller that has just looked would sleep through it.
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_one();
    }
  };

  xla::ffi::ThreadPool pool_;
  int64_t num_threads_;
};

}  // namespace ellm
