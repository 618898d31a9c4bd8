// parallel_ranges: every unit once, in runs, and the columns that follow from it.
#include "kernels/cpu/ranges.h"

#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels/cpu/columns.h"

namespace ellm {
namespace {

void on_threads(int64_t units, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < units; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

TEST(every_unit_is_done_once) {
  for (int64_t threads : {1, 2, 3, 8}) {
    for (int64_t units : {0, 1, 2, 7, 64}) {
      std::mutex mutex;
      std::vector<int> times(units);
      parallel_ranges(on_threads, threads, units, [&](const RangeUnit& unit) {
        std::lock_guard<std::mutex> lock(mutex);
        ++times[unit.index];
      });
      for (int count : times) CHECK_EQ(count, 1);
    }
  }
}

TEST(a_thread_alone_is_told_how_it_goes_on) {
  // One after the other: the first goes through its own range, then through all the others.
  std::vector<RangeUnit> units;
  parallel_ranges(run_serially, 2, 7, [&](const RangeUnit& unit) { units.push_back(unit); });
  const int64_t next[] = {1, 2, 2, 4, 5, 6, 6};
  CHECK_EQ(units.size(), size_t{7});
  for (int64_t i = 0; i < 7; ++i) {
    CHECK_EQ(units[i].index, i);
    CHECK_EQ(units[i].next, next[i]);
    CHECK_EQ(units[i].goes_on, i != 0 && i != 3);
  }
}

TEST(columns_end_where_the_result_does) {
  const Columns last_but_one = unit_columns({1, 2, true}, 48, 100);
  CHECK_EQ(last_but_one.begin, 48);
  CHECK_EQ(last_but_one.end, 96);
  CHECK_EQ(last_but_one.ahead, 100);
  CHECK(last_but_one.asked);
  const Columns last = unit_columns({2, 2, true}, 48, 100);
  CHECK_EQ(last.begin, 96);
  CHECK_EQ(last.end, 100);
  CHECK_EQ(last.ahead, 100);
}

}  // namespace
}  // namespace ellm
