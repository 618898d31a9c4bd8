// What devices there are, and what memory costs on them, as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings.h"
#include "memory/devices.h"
#include "memory/mapping_times.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {
namespace {

nb::list list_devices() {
  const auto infos = unlocked([]() -> Result<std::vector<CudaDeviceInfo>> {
    const Result<const CudaApi*> api = load_cuda();
    if (!api.ok()) return std::vector<CudaDeviceInfo>{};
    return list_cuda_devices(*api.value());
  });
  nb::list devices;
  for (const CudaDeviceInfo& info : value_or_raise(infos)) {
    nb::dict d;
    d["name"] = info.name;
    d["total_bytes"] = info.total_bytes;
    d["free_bytes"] = info.free_bytes;
    d["compute_capability"] = nb::make_tuple(info.capability_major, info.capability_minor);
    devices.append(d);
  }
  return devices;
}

nb::object why_no_cuda() {
  const Status s = unlocked([] { return load_cuda().status(); });
  if (s.ok()) return nb::none();
  return nb::str(s.message().c_str());
}

size_t granularity_of(const std::string& device) {
  return value_or_raise(unlocked([&]() -> Result<size_t> {
    const auto driver = open_device_memory(device);
    if (!driver.ok()) return driver.status();
    return driver.value()->granularity_bytes();
  }));
}

MappingTimes time_mapping_on(const std::string& device, int64_t chunk_bytes, int64_t count,
                             int64_t repeats) {
  const size_t bytes = non_negative("chunk_bytes", chunk_bytes);
  const size_t chunks = non_negative("count", count);
  const size_t times = non_negative("repeats", repeats);
  return value_or_raise(unlocked([&]() -> Result<MappingTimes> {
    const auto driver = open_device_memory(device);
    if (!driver.ok()) return driver.status();
    return time_mapping(*driver.value(), bytes, chunks, times);
  }));
}

}  // namespace

void bind_devices(nb::module_& m) {
  m.def("cuda_devices", &list_devices, "The CUDA devices of this machine; [] where there is none.");
  m.def("cuda_error", &why_no_cuda, "Why there is no CUDA here; None where there is.");
  m.def("granularity_bytes", &granularity_of, "device"_a,
        "The smallest chunk of a device's memory.");
  m.def("time_mapping", &time_mapping_on, "device"_a, "chunk_bytes"_a, "count"_a, "repeats"_a,
        "Microseconds per chunk of each call that mapping consists of, per repeat.");
}

}  // namespace ellm
