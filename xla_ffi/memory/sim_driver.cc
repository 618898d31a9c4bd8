#include "memory/sim_driver.h"

#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "memory/text.h"

namespace ellm {
namespace {

uint64_t number(const std::byte* at) { return reinterpret_cast<uint64_t>(at); }

void expect(bool rule, const char* broken) {
  if (rule) return;
  std::fprintf(stderr, "simulated driver: %s; this is a bug in the caller\n", broken);
  std::abort();
}

}  // namespace

Status SimDriver::inject_faults(uint64_t seed, double rate) {
  if (!(rate >= 0 && rate <= 1)) {
    return Status(Code::kInvalid, "a fault rate of " + std::to_string(rate) +
                                      " was asked for; it is a probability from 0 to 1");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  random_ = seed;
  rate_ = rate;
  return Status::Ok();
}

Status SimDriver::fail_call(uint64_t n) {
  if (n == 0) {
    return Status(Code::kInvalid, "call 0 was asked to fail; the next call is number 1");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  failing_call_ = calls_ + n;
  return Status::Ok();
}

uint64_t SimDriver::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_;
}

bool SimDriver::drawn_to_fail() {
  if (rate_ == 0) return false;
  // splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
  random_ += 0x9e3779b97f4a7c15u;
  uint64_t z = random_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53 < rate_;
}

Status SimDriver::count_call(const char* verb) {
  const bool drawn = drawn_to_fail();
  if (++calls_ != failing_call_ && !drawn) return Status::Ok();
  return Status(Code::kDriver, std::string(verb) + ", call " + std::to_string(calls_) +
                                   " of the simulated driver, failed as it was told to");
}

bool SimDriver::reserved(uint64_t at, size_t bytes) const {
  const auto after = ranges_.upper_bound(at);
  if (after == ranges_.begin()) return false;
  const auto range = std::prev(after);
  return at + bytes <= range->first + range->second;
}

Status SimDriver::reserve(size_t bytes, size_t alignment, std::byte** base) {
  std::lock_guard<std::mutex> lock(mutex_);
  expect(bytes > 0 && bytes % granularity_bytes() == 0, "reserve of a size that is no whole pages");
  expect(alignment > 0 && (alignment & (alignment - 1)) == 0, "reserve with an odd alignment");
  if (Status s = count_call("reserve"); !s.ok()) return s;
  const uint64_t at = (next_address_ + alignment - 1) / alignment * alignment;
  next_address_ = at + bytes;
  ranges_.emplace(at, bytes);
  *base = reinterpret_cast<std::byte*>(at);
  return Status::Ok();
}

Status SimDriver::release(std::byte* base, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto range = ranges_.find(number(base));
  expect(range != ranges_.end() && range->second == bytes, "release of what is no reserved range");
  const auto mapping = mappings_.lower_bound(number(base));
  expect(mapping == mappings_.end() || mapping->first >= number(base) + bytes,
         "release of a range in which something is mapped");
  if (Status s = count_call("release"); !s.ok()) return s;
  ranges_.erase(range);
  return Status::Ok();
}

Status SimDriver::create(size_t bytes, Handle* handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  expect(bytes > 0 && bytes % granularity_bytes() == 0, "create of a size that is no whole pages");
  if (Status s = count_call("create"); !s.ok()) return s;
  *handle = ++last_handle_;
  memory_.emplace(*handle, Memory{bytes, 0});
  return Status::Ok();
}

Status SimDriver::destroy(Handle handle, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto memory = memory_.find(handle);
  expect(memory != memory_.end() && memory->second.bytes == bytes, "destroy of no such memory");
  expect(memory->second.mappings == 0, "destroy of memory that is mapped");
  if (Status s = count_call("destroy"); !s.ok()) return s;
  memory_.erase(memory);
  return Status::Ok();
}

Status SimDriver::map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t first = number(at);
  expect(n > 0 && reserved(first, n * chunk_bytes), "map outside of every reserved range");
  const auto next = mappings_.lower_bound(first);
  expect(next == mappings_.end() || next->first >= first + n * chunk_bytes, "map over a mapping");
  if (next != mappings_.begin()) {
    const auto before = std::prev(next);
    expect(before->first + before->second.bytes <= first, "map into a mapping");
  }
  for (size_t i = 0; i < n; ++i) {
    const auto memory = memory_.find(handles[i]);
    expect(memory != memory_.end() && memory->second.bytes == chunk_bytes, "map of no such memory");
  }
  if (Status s = count_call("map"); !s.ok()) return s;
  for (size_t i = 0; i < n; ++i) {
    ++memory_[handles[i]].mappings;
    mappings_.emplace_hint(next, first + i * chunk_bytes, Mapping{handles[i], chunk_bytes});
  }
  return Status::Ok();
}

Status SimDriver::unmap(std::byte* at, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto first = mappings_.lower_bound(number(at));
  uint64_t end = number(at);
  auto last = first;
  for (; last != mappings_.end() && last->first < number(at) + bytes; ++last) {
    expect(last->first == end, "unmap of what is not mapped");
    end += last->second.bytes;
  }
  expect(bytes > 0 && end == number(at) + bytes, "unmap of what is not mapped");
  if (Status s = count_call("unmap"); !s.ok()) return s;
  for (auto it = first; it != last; ++it) --memory_[it->second.handle].mappings;
  mappings_.erase(first, last);
  return Status::Ok();
}

}  // namespace ellm
