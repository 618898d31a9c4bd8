#include "kv/slot_worker.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace ellm {

void SlotWorker::post(std::vector<Job> jobs) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Job& job : jobs) pending_[job.slot].fetch_add(1, std::memory_order_relaxed);
    std::move(jobs.begin(), jobs.end(), std::back_inserter(queue_));
  }
  if (!thread_.joinable()) {
    stopping_ = false;
    thread_ = std::thread([this] { run(); });
  }
  posted_.notify_one();
}

void SlotWorker::count_done(int32_t slot) {
  pending_[slot].fetch_sub(1, std::memory_order_release);
  done_.notify_all();
}

void SlotWorker::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    posted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const Job job = std::move(queue_.front());
    queue_.pop_front();
    running_ = job.slot;
    lock.unlock();
    job.work();
    lock.lock();
    running_ = -1;
    count_done(job.slot);
  }
}

void SlotWorker::wait_for(int32_t slot) {
  if (!busy(slot)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this, slot] { return running_ != slot; });
  // All of them, or the thread would begin the second while the first is done here.
  std::vector<Job> jobs;
  const auto others = std::stable_partition(queue_.begin(), queue_.end(),
                                            [slot](const Job& job) { return job.slot != slot; });
  std::move(others, queue_.end(), std::back_inserter(jobs));
  queue_.erase(others, queue_.end());
  lock.unlock();
  for (const Job& job : jobs) job.work();
  lock.lock();
  for (size_t i = 0; i < jobs.size(); ++i) count_done(slot);
}

void SlotWorker::settle() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return queue_.empty() && running_ == -1; });
}

void SlotWorker::stop() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  posted_.notify_one();
  thread_.join();
}

}  // namespace ellm
