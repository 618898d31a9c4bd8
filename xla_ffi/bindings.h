// What the Python bindings share: statuses as exceptions, the GIL, and one function per file that
// adds its classes to the module.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "memory/status.h"

namespace ellm {

void bind_pool(nanobind::module_& m);
void bind_kv(nanobind::module_& m);
void bind_tiers(nanobind::module_& m);
void bind_int4(nanobind::module_& m);
void bind_int8(nanobind::module_& m);
void bind_panels(nanobind::module_& m);
void bind_cuda_attention(nanobind::module_& m);
void bind_devices(nanobind::module_& m);

struct OutOfMemoryError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void raise_if_failed(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return;
    case Code::kInvalid:
      throw nanobind::value_error(status.message().c_str());
    case Code::kOutOfMemory:
      throw OutOfMemoryError(status.message());
    case Code::kDriver:
    case Code::kBroken:
    case Code::kNotMapped:
      throw std::runtime_error(status.message());
  }
}

template <class T>
T value_or_raise(Result<T> result) {
  raise_if_failed(result.status());
  return std::move(result.value());
}

// Runs native work without the GIL.
template <class Work>
auto unlocked(Work&& work) {
  nanobind::gil_scoped_release released;
  return work();
}

// Ends what a Python object stands for, which may wait for the device, without the GIL. While the
// interpreter ends a thread that lets go of the GIL may not get it back: then it is kept.
template <class Work>
void end_unlocked(Work&& work) {
  if (Py_IsInitialized()) {
    unlocked(work);
  } else {
    work();
  }
}

inline size_t non_negative(const char* name, int64_t value) {
  if (value < 0) {
    const std::string message =
        std::string(name) + " is " + std::to_string(value) + "; it must not be negative";
    throw nanobind::value_error(message.c_str());
  }
  return static_cast<size_t>(value);
}

}  // namespace ellm
