// Pool as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "memory/devices.h"
#include "wrappers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {
namespace {

std::shared_ptr<ChunkPool> make_pool(std::shared_ptr<Driver> driver, int64_t chunk_bytes,
                                     int64_t limit_bytes) {
  return value_or_raise(ChunkPool::Create(std::move(driver),
                                          non_negative("chunk_bytes", chunk_bytes),
                                          non_negative("limit_bytes", limit_bytes)));
}

}  // namespace

PyPool::PyPool(int64_t chunk_bytes, int64_t limit_bytes, const std::string& device)
    : device_(device),
      pool_(make_pool(value_or_raise(unlocked([&] { return open_device_memory(device); })),
                      chunk_bytes, limit_bytes)) {}

PyPool::PyPool(std::shared_ptr<SimDriver> simulator, int64_t chunk_bytes, int64_t limit_bytes)
    : device_("simulated"),
      simulator_(std::move(simulator)),
      pool_(make_pool(simulator_, chunk_bytes, limit_bytes)) {}

PyPool::~PyPool() {
  if (pool_ == nullptr) return;  // Moved from.
  end_unlocked([&] {
    pool_.reset();
    simulator_.reset();
  });
}

PyPool PyPool::simulated(int64_t chunk_bytes, int64_t limit_bytes) {
  return PyPool(std::make_shared<SimDriver>(), chunk_bytes, limit_bytes);
}

SimDriver& PyPool::simulator() const {
  if (simulator_ == nullptr) {
    throw nb::value_error("this pool has real memory; only Pool.simulated() can do that");
  }
  return *simulator_;
}

void PyPool::inject_faults(uint64_t seed, double rate) {
  raise_if_failed(simulator().inject_faults(seed, rate));
}

void PyPool::fail_call(int64_t n) { raise_if_failed(simulator().fail_call(non_negative("n", n))); }

void PyPool::cache(const std::vector<ChunkId>& ids) { raise_if_failed(pool_->cache(ids)); }

size_t PyPool::uncache(const std::vector<ChunkId>& ids) {
  return value_or_raise(pool_->uncache(ids));
}

void PyPool::reserve(const std::string& owner, int64_t bytes) {
  const Owner o = value_or_raise(owner_from_name(owner));
  const size_t n = non_negative("bytes", bytes);
  raise_if_failed(unlocked([&] { return pool_->reserve_bytes(o, n); }));
}

void PyPool::give_back(const std::string& owner, int64_t bytes) {
  const Owner o = value_or_raise(owner_from_name(owner));
  raise_if_failed(pool_->return_bytes(o, non_negative("bytes", bytes)));
}

size_t PyPool::trim(int64_t keep_bytes) {
  const size_t keep = non_negative("keep_bytes", keep_bytes);
  return value_or_raise(unlocked([&] { return pool_->trim(keep); }));
}

void PyPool::resize(int64_t limit_bytes) {
  const size_t limit = non_negative("limit_bytes", limit_bytes);
  raise_if_failed(unlocked([&] { return pool_->set_limit(limit); }));
}

void PyPool::back_ahead(int64_t bytes) {
  const size_t ahead = non_negative("bytes", bytes);
  unlocked([&] { pool_->back_ahead(ahead); });
}

void PyPool::synchronize() {
  raise_if_failed(unlocked([&] { return pool_->driver().synchronize(); }));
}

nb::dict PyPool::usage() const {
  const Usage u = pool_->usage();
  nb::dict d;
  d["limit"] = u.limit;
  d["free"] = u.free;
  d["kv"] = u.kv;
  d["cache"] = u.cache;
  d["activation"] = u.activation;
  d["weights"] = u.weights;
  d["workspace"] = u.workspace;
  d["available"] = u.available;
  d["backed_free"] = u.backed_free;
  d["obtainable"] = u.obtainable;
  d["physical"] = u.physical;
  d["peak_kv"] = u.peak_kv;
  d["peak_cache"] = u.peak_cache;
  d["peak_activation"] = u.peak_activation;
  d["peak_weights"] = u.peak_weights;
  d["peak_workspace"] = u.peak_workspace;
  d["peak_available"] = u.peak_available;
  d["peak_used"] = u.peak_used;
  d["peak_physical"] = u.peak_physical;
  d["create_calls"] = u.create_calls;
  d["create_us"] = u.create_us;
  d["destroy_calls"] = u.destroy_calls;
  d["destroy_us"] = u.destroy_us;
  return d;
}

void bind_pool(nb::module_& m) {
  nb::class_<PyPool>(m, "Pool",
                     "Physical memory under one limit, counted by owner to the byte. Thread-safe.")
      .def(nb::init<int64_t, int64_t, const std::string&>(), "chunk_bytes"_a, "limit_bytes"_a,
           "device"_a = "cpu")
      .def_static("simulated", &PyPool::simulated, "chunk_bytes"_a, "limit_bytes"_a,
                  "A pool whose driver keeps books but has no memory.")
      .def_prop_ro("chunk_bytes", [](const PyPool& pool) { return pool.get()->chunk_bytes(); })
      .def_prop_ro("device", &PyPool::device, "\"cpu\", \"cuda:0\", ... or \"simulated\".")
      .def("usage", &PyPool::usage,
           "One consistent picture in bytes; free + kv + cache + activation + weights + workspace "
           "== limit.")
      .def("reset_peaks", &PyPool::reset_peaks, "Starts the peak_* values of usage() anew.")
      .def(
          "reserve", &PyPool::reserve, "owner"_a, "bytes"_a,
          "Counts bytes that are allocated elsewhere. Raises OutOfMemory and changes nothing where "
          "they do not fit.")
      .def("give_back", &PyPool::give_back, "owner"_a, "bytes"_a,
           "Undoes reserve(), in any portions.")
      .def("cache", &PyPool::cache, "ids"_a,
           "The prefix cache takes one reference to each chunk, or to none.")
      .def("uncache", &PyPool::uncache, "ids"_a,
           "The prefix cache gives the chunks up; returns the bytes that became free or available.")
      .def("trim", &PyPool::trim, "keep_bytes"_a = 0,
           "Hands backed free memory beyond keep_bytes to the system; returns the bytes.")
      .def("resize", &PyPool::resize, "limit_bytes"_a,
           "Sets the limit. Raises OutOfMemory below what is owned or available.")
      .def("back_ahead", &PyPool::back_ahead, "bytes"_a,
           "Has up to `bytes` of free memory made ahead, by a thread of its own; 0 ends it.")
      .def("synchronize", &PyPool::synchronize,
           "Waits until the device has done everything that was started on it.")
      .def("inject_faults", &PyPool::inject_faults, "seed"_a, "rate"_a,
           "Simulated pools: each driver call fails with this probability.")
      .def("fail_call", &PyPool::fail_call, "n"_a,
           "Simulated pools: the n-th driver call from now fails.")
      .def_prop_ro("driver_calls", &PyPool::driver_calls, "Simulated pools: calls so far.");
}

}  // namespace ellm
