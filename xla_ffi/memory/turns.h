// A lock for work that takes long, where whoever works ahead of others lets all of them go first.
#pragma once

#include <condition_variable>
#include <mutex>

namespace ellm {

// Thread-safe. A std::mutex would not do: the thread that works ahead would lock it again before
// one that waits has woken up, for as long as there is something to do.
class Turns {
 public:
  enum class For { kNow, kLater };

  // Has the turn for as long as it lives. One for later waits until nobody wants one for now.
  class Turn {
   public:
    explicit Turn(Turns& turns, For when = For::kNow) : turns_(turns) {
      std::unique_lock<std::mutex> lock(turns_.mutex_);
      const bool now = when == For::kNow;
      if (now) ++turns_.waiting_;
      turns_.free_.wait(lock, [&] { return !turns_.taken_ && (now || turns_.waiting_ == 0); });
      if (now) --turns_.waiting_;
      turns_.taken_ = true;
    }
    ~Turn() {
      {
        std::lock_guard<std::mutex> lock(turns_.mutex_);
        turns_.taken_ = false;
      }
      turns_.free_.notify_all();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Turns& turns_;
  };

 private:
  std::mutex mutex_;
  std::condition_variable free_;
  int waiting_ = 0;  // For a turn for now.
  bool taken_ = false;
};

}  // namespace ellm
