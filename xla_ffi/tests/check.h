// A test harness in one header: include it in one file per executable, write TEST(name) { ... }.
// Usage of the executable: [part of a test's name] [--seed N]. Exit code 1 if anything failed.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

// Whether TSan watches, which costs much and finds what threads do to each other, nothing else.
#ifdef __SANITIZE_THREAD__
inline constexpr bool under_tsan = true;
#else
inline constexpr bool under_tsan = false;
#endif

struct Test {
  const char* name;
  void (*body)();
};
struct Abandon {};  // Thrown by REQUIRE to leave a test.

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
// Called after each test, which they may fail.
inline std::vector<void (*)()>& after_each() {
  static std::vector<void (*)()> all;
  return all;
}
inline std::atomic<int> failures{0};
inline uint64_t seed = 20250611;  // Of every random choice in a test; printed with a failure.

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

template <class T>
std::string shown(const T& value) {
  std::ostringstream text;
  if constexpr (std::is_enum_v<T>) {
    text << static_cast<int64_t>(value);
  } else {
    text << value;
  }
  return text.str();
}

inline bool report(bool passed, const char* file, int line, const std::string& what) {
  if (passed) return true;
  ++failures;
  std::ostringstream text;  // One write, so that lines of several threads do not mix.
  text << file << ":" << line << ": " << what << " (seed " << seed << ")\n";
  std::cerr << text.str();
  return false;
}

template <class A, class B>
bool equal(const A& a, const B& b, const char* file, int line, const char* what) {
  if (a == b) return true;
  return report(false, file, line, std::string(what) + ": " + shown(a) + " != " + shown(b));
}

inline int run(int argc, char** argv) {
  const char* filter = "";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      filter = argv[i];
    }
  }
  int ran = 0;
  for (const Test& test : tests()) {
    if (std::strstr(test.name, filter) == nullptr) continue;
    const int before = failures;
    try {
      test.body();
    } catch (const Abandon&) {
    }
    for (void (*const hook)() : after_each()) hook();
    ++ran;
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
  }
  std::printf("%d tests, %d failed checks\n", ran, failures.load());
  return failures > 0 || ran == 0 ? 1 : 0;
}

}  // namespace check

#define TEST(name)                                             \
  static void test_##name();                                   \
  static const check::Register reg_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(condition) check::report((condition), __FILE__, __LINE__, "CHECK(" #condition ")")
#define CHECK_EQ(a, b) check::equal((a), (b), __FILE__, __LINE__, "CHECK_EQ(" #a ", " #b ")")
#define REQUIRE(condition) \
  if (!CHECK(condition)) throw check::Abandon()

int main(int argc, char** argv) { return check::run(argc, argv); }
