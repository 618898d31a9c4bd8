// Turns: one at a time, and those for now before those for later.
#include "memory/turns.h"

#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace ellm {
namespace {

using For = Turns::For;

TEST(one_thread_at_a_time_has_the_turn) {
  Turns turns;
  int inside = 0, had = 0;  // Not atomic: TSan would tell.
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, when = i % 2 == 0 ? For::kNow : For::kLater] {
      for (int n = 0; n < 500; ++n) {
        const Turns::Turn turn(turns, when);
        CHECK_EQ(++inside, 1);
        ++had;
        --inside;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(had, 2000);
}

TEST(whoever_works_ahead_lets_those_go_first_that_came_after_it) {
  constexpr int kRounds = 10;
  const auto settle = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  int in_order = 0;
  for (int round = 0; round < kRounds; ++round) {
    Turns turns;
    std::string order;
    std::vector<std::thread> threads;
    {
      const Turns::Turn turn(turns);
      for (const auto [when, name] : {std::pair(For::kLater, 'l'), std::pair(For::kLater, 'l'),
                                      std::pair(For::kNow, 'n'), std::pair(For::kNow, 'n')}) {
        threads.emplace_back([&, when = when, name = name] {
          const Turns::Turn own(turns, when);
          order += name;
        });
        settle();
      }
    }
    for (std::thread& thread : threads) thread.join();
    in_order += order == "nnll";
  }
  CHECK(in_order > kRounds / 2);  // A thread may have been late even so.
}

}  // namespace
}  // namespace ellm
