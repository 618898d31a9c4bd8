#include "memory/mapping_times.h"

#include <chrono>

#include "memory/cuda_driver.h"

namespace ellm {
namespace {

// A reserved range and handles for it. Its destructor gives everything back.
class Bench {
 public:
  Bench(Driver& driver, size_t chunk_bytes, size_t count)
      : driver_(driver),
        cuda_(dynamic_cast<CudaDriver*>(&driver)),
        chunk_bytes_(chunk_bytes),
        count_(count) {}

  ~Bench() {
    if (base_ == nullptr) return;
    if (mapped_begin_ < mapped_end_) {
      (void)driver_.unmap(at(mapped_begin_), (mapped_end_ - mapped_begin_) * chunk_bytes_);
    }
    (void)destroy();
    (void)driver_.release(base_, bytes());
  }

  Status run(MappingTimes* times) {
    Status s = driver_.reserve(bytes(), chunk_bytes_, &base_);
    if (s.ok()) s = time(times, "create", [this] { return create(); });
    if (s.ok()) s = map_and_unmap(times, "", count_);
    if (s.ok()) s = map_and_unmap(times, "_batched", 1);
    if (s.ok()) s = time(times, "destroy", [this] { return destroy(); });
    return s;
  }

 private:
  size_t bytes() const { return count_ * chunk_bytes_; }
  std::byte* at(size_t chunk) const { return base_ + chunk * chunk_bytes_; }

  template <class Work>
  Status time(MappingTimes* times, const std::string& name, Work work) {
    const auto start = std::chrono::steady_clock::now();
    Status s = work();
    const std::chrono::duration<double, std::micro> spent =
        std::chrono::steady_clock::now() - start;
    if (s.ok()) (*times)[name].push_back(spent.count() / static_cast<double>(count_));
    return s;
  }

  // The same number of chunks in each of `calls` calls.
  template <class Call>
  Status in_calls(size_t calls, Call call) {
    const size_t n = count_ / calls;
    Status s = Status::Ok();
    for (size_t first = 0; s.ok() && first < count_; first += n) s = call(first, n);
    return s;
  }

  Status map_and_unmap(MappingTimes* times, const std::string& suffix, size_t calls) {
    mapped_begin_ = mapped_end_ = 0;
    Status s = time(times, "map" + suffix, [&] {
      return in_calls(calls, [this](size_t first, size_t n) { return map(first, n); });
    });
    if (s.ok() && cuda_ != nullptr) {
      s = time(times, "set_access" + suffix, [&] {
        return in_calls(calls, [this](size_t first, size_t n) {
          return cuda_->allow_access(at(first), n * chunk_bytes_);
        });
      });
    }
    if (!s.ok()) return s;
    return time(times, "unmap" + suffix, [&] {
      return in_calls(calls, [this](size_t first, size_t n) { return unmap(first, n); });
    });
  }

  Status map(size_t first, size_t n) {
    const Handle* handles = &handles_[first];
    Status s = cuda_ != nullptr ? cuda_->map_only(at(first), handles, n, chunk_bytes_)
                                : driver_.map(at(first), handles, n, chunk_bytes_);
    if (s.ok() || s.code() == Code::kBroken) mapped_end_ = first + n;
    return s;
  }

  Status unmap(size_t first, size_t n) {
    Status s = driver_.unmap(at(first), n * chunk_bytes_);
    if (s.ok()) mapped_begin_ = first + n;
    return s;
  }

  Status create() {
    Status s = Status::Ok();
    for (size_t i = 0; s.ok() && i < count_; ++i) {
      Handle handle;
      s = driver_.create(chunk_bytes_, &handle);
      if (s.ok()) handles_.push_back(handle);
    }
    return s;
  }

  Status destroy() {
    Status s = Status::Ok();
    while (s.ok() && !handles_.empty()) {
      s = driver_.destroy(handles_.back(), chunk_bytes_);
      if (s.ok()) handles_.pop_back();
    }
    return s;
  }

  Driver& driver_;
  CudaDriver* const cuda_;
  const size_t chunk_bytes_;
  const size_t count_;
  std::byte* base_ = nullptr;
  std::vector<Handle> handles_;
  size_t mapped_begin_ = 0, mapped_end_ = 0;  // In chunks; some of them may be in doubt.
};

}  // namespace

Result<MappingTimes> time_mapping(Driver& driver, size_t chunk_bytes, size_t count,
                                  size_t repeats) {
  if (count == 0 || repeats == 0) {
    return Status(Code::kInvalid, "time_mapping was asked for " + std::to_string(count) +
                                      " chunks and " + std::to_string(repeats) +
                                      " repeats; ask for at least one of each");
  }
  MappingTimes times;
  for (size_t i = 0; i < repeats; ++i) {
    Bench bench(driver, chunk_bytes, count);
    if (Status s = bench.run(&times); !s.ok()) return s;
  }
  return times;
}

}  // namespace ellm
