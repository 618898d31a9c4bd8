// Threads that hand over to each other by hand, for emulating thousands of GPU threads on one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace ellm {

class Fiber {
 public:
  // Runs `body` once for each of `count` fibers, until all have returned. Groups of `group` fibers
  // take turns, and a group goes on for as long as it can: first group first, or with `backwards`
  // last group first. The first exception of a fiber is thrown here; so is std::runtime_error where
  // all that are left only yield.
  static void run_all(int32_t count, int32_t group, bool backwards,
                      const std::function<void()>& body) {
    State state;
    state.body = &body;
    while (static_cast<int32_t>(stacks().size()) < count) {
      stacks().push_back(std::make_unique<unsigned char[]>(kStackBytes));
    }
    state.fibers.resize(count);
    for (int32_t i = 0; i < count; ++i) make(state.fibers[i].context, stacks()[i].get());
    state_ = &state;
    const int32_t groups = (count + group - 1) / group;
    for (bool stuck = false; !stuck;) {
      const uint64_t before = state.progress;
      for (int32_t turn = 0; turn < groups; ++turn) {
        const int32_t first = (backwards ? groups - 1 - turn : turn) * group;
        exhaust(state, first, std::min(first + group, count));
      }
      stuck = state.progress == before;
    }
    const bool done = std::all_of(state.fibers.begin(), state.fibers.end(),
                                  [](const One& fiber) { return fiber.done; });
    state_ = nullptr;
    if (state.error) std::rethrow_exception(state.error);
    if (!done) throw std::runtime_error("threads wait for each other for ever");
  }

  static int32_t current() { return state_->current; }
  // Lets the others run.
  static void yield() { leave(state_->fibers[state_->current]); }
  // Something happened that another fiber may be waiting for.
  static void note_progress() { ++state_->progress; }

 private:
  static constexpr size_t kStackBytes = size_t{256} << 10;

  struct One {
    ucontext_t context;
    bool done = false;
    void* fake_stack = nullptr;
  };
  struct State {
    const std::function<void()>* body = nullptr;
    std::vector<One> fibers;
    ucontext_t main;
    int32_t current = 0;
    uint64_t progress = 0;
    std::exception_ptr error;
    void* main_fake_stack = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
  };

  static std::vector<std::unique_ptr<unsigned char[]>>& stacks() {
    static std::vector<std::unique_ptr<unsigned char[]>> all;
    return all;
  }

  // Runs fibers [begin, end) until none of them can go on, or one has thrown.
  static void exhaust(State& state, int32_t begin, int32_t end) {
    for (bool stuck = false; !stuck;) {
      const uint64_t before = state.progress;
      for (int32_t i = begin; i < end && !state.error; ++i) {
        if (state.fibers[i].done) continue;
        state.current = i;
        resume(state.fibers[i]);
        if (state.fibers[i].done) ++state.progress;
      }
      stuck = state.progress == before;
    }
  }

  static void make(ucontext_t& context, unsigned char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Fiber::enter, 0);
  }

  static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &state_->main_stack, &state_->main_stack_bytes);
#endif
    try {
      (*state_->body)();
    } catch (...) {
      if (!state_->error) state_->error = std::current_exception();
    }
    One& self = state_->fibers[state_->current];
    self.done = true;
    leave(self);
  }

  static void resume(One& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&state_->main_fake_stack, fiber.context.uc_stack.ss_sp,
                                   fiber.context.uc_stack.ss_size);
#endif
    swapcontext(&state_->main, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(state_->main_fake_stack, nullptr, nullptr);
#endif
  }

  static void leave(One& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, state_->main_stack,
                                   state_->main_stack_bytes);
#endif
    swapcontext(&fiber.context, &state_->main);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &state_->main_stack,
                                    &state_->main_stack_bytes);
#endif
  }

  static inline State* state_ = nullptr;
};

}  // namespace ellm
