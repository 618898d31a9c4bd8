// A thread that does work on slots, one job after the other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ellm {

// Jobs of a slot are done in the order in which they were posted. One thread, the host's, calls
// everything here but busy(), which is for any. What a job has written is seen by whoever finds its
// slot not busy afterwards.
class SlotWorker {
 public:
  struct Job {
    int32_t slot;
    std::function<void()> work;  // Does not call the worker.
  };

  explicit SlotWorker(size_t num_slots) : pending_(num_slots) {}
  ~SlotWorker() { stop(); }
  SlotWorker(const SlotWorker&) = delete;
  SlotWorker& operator=(const SlotWorker&) = delete;

  // Whether the slot has jobs that are not done.
  bool busy(int32_t slot) const { return pending_[slot].load(std::memory_order_acquire) != 0; }
  // Starts the thread if it does not run.
  void post(std::vector<Job> jobs);
  // Returns when the slot is not busy. Jobs of it that the thread has not begun are done here, so
  // that nobody waits for other slots.
  void wait_for(int32_t slot);
  // Returns when all jobs are done; the thread does them.
  void settle();
  // As settle(), and ends the thread.
  void stop();

 private:
  void run();
  // With the lock held.
  void count_done(int32_t slot);

  std::vector<std::atomic<uint32_t>> pending_;  // Jobs by slot.
  std::mutex mutex_;
  std::condition_variable posted_;
  std::condition_variable done_;
  std::deque<Job> queue_;
  int32_t running_ = -1;  // The slot that the thread is at work on; -1: none.
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace ellm
