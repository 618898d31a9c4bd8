// The native library as Python sees it: arguments checked, statuses turned into exceptions, the GIL
// released round driver work.
#include <malloc.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ffi/registrations.h"
#include "kernels/cpu/dispatch.h"
#include "kv/kv_cache.h"
#include "kv/registry.h"
#include "memory/chunk_pool.h"
#include "memory/host_driver.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {
namespace {

struct OutOfMemoryError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void raise_if_failed(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return;
    case Code::kInvalid:
      throw nb::value_error(status.message().c_str());
    case Code::kOutOfMemory:
      throw OutOfMemoryError(status.message());
    case Code::kDriver:
    case Code::kBroken:
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
  nb::gil_scoped_release released;
  return work();
}

size_t non_negative(const char* name, int64_t value) {
  if (value < 0) {
    const std::string message =
        std::string(name) + " is " + std::to_string(value) + "; it must not be negative";
    throw nb::value_error(message.c_str());
  }
  return static_cast<size_t>(value);
}

// A pool over host memory.
class Pool {
 public:
  Pool(int64_t chunk_bytes, int64_t limit_bytes)
      : pool_(value_or_raise(ChunkPool::Create(value_or_raise(HostDriver::Create()),
                                               non_negative("chunk_bytes", chunk_bytes),
                                               non_negative("limit_bytes", limit_bytes)))) {}

  const std::shared_ptr<ChunkPool>& get() const { return pool_; }
  size_t chunk_bytes() const { return pool_->chunk_bytes(); }
  void reset_peaks() { pool_->reset_peaks(); }

  void reserve(const std::string& owner, int64_t bytes) {
    const Owner o = value_or_raise(owner_from_name(owner));
    const size_t n = non_negative("bytes", bytes);
    raise_if_failed(unlocked([&] { return pool_->reserve_bytes(o, n); }));
  }

  void give_back(const std::string& owner, int64_t bytes) {
    const Owner o = value_or_raise(owner_from_name(owner));
    raise_if_failed(pool_->return_bytes(o, non_negative("bytes", bytes)));
  }

  size_t trim(int64_t keep_bytes) {
    const size_t keep = non_negative("keep_bytes", keep_bytes);
    return value_or_raise(unlocked([&] { return pool_->trim(keep); }));
  }

  void resize(int64_t limit_bytes) {
    const size_t limit = non_negative("limit_bytes", limit_bytes);
    raise_if_failed(unlocked([&] { return pool_->set_limit(limit); }));
  }

  nb::dict usage() const {
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

 private:
  std::shared_ptr<ChunkPool> pool_;
};

// A KV cache with its number in the registry, closed with the Python object.
class PyKvCache {
 public:
  PyKvCache(const Pool& pool, const KvLayout& layout)
      : cache_(value_or_raise(unlocked([&] { return KvCache::Create(pool.get(), layout); }))),
        id_(register_kv(cache_)) {}
  ~PyKvCache() { unregister_kv(id_); }
  PyKvCache(const PyKvCache&) = delete;
  PyKvCache& operator=(const PyKvCache&) = delete;

  int32_t id() const { return id_; }
  const KvLayout& layout() const { return cache_->layout(); }

  int32_t take_slot(int64_t tokens) { return value_or_raise(cache_->take_slot(tokens)); }

  void extend(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens) {
    if (slots.size() != tokens.size()) {
      const std::string message = "extend got " + std::to_string(slots.size()) + " slots and " +
                                  std::to_string(tokens.size()) +
                                  " token counts; pass one count per slot";
      throw nb::value_error(message.c_str());
    }
    raise_if_failed(
        unlocked([&] { return cache_->extend(slots.size(), slots.data(), tokens.data()); }));
  }

  void truncate(int32_t slot, int64_t tokens) {
    raise_if_failed(unlocked([&] { return cache_->truncate(slot, tokens); }));
  }

  void release(int32_t slot) {
    raise_if_failed(unlocked([&] { return cache_->release(slot); }));
  }

  size_t reclaim(int64_t bytes) {
    const size_t n = non_negative("bytes", bytes);
    return value_or_raise(unlocked([&] { return cache_->reclaim(n); }));
  }

  size_t trim_available() {
    return value_or_raise(unlocked([&] { return cache_->trim_available(); }));
  }

  int64_t mapped_tokens(int32_t slot) const { return cache_->mapped_tokens(checked(slot)); }
  size_t mapped_bytes(int32_t slot) const { return cache_->mapped_bytes(checked(slot)); }
  std::string slot_state(int32_t slot) const {
    return slot_state_name(cache_->slot_state(checked(slot)));
  }

  nb::dict stats() const {
    const KvStats s = cache_->stats();
    nb::dict d;
    d["active_bytes"] = s.active_bytes;
    d["available_bytes"] = s.available_bytes;
    d["broken_bytes"] = s.broken_bytes;
    d["active_slots"] = s.active_slots;
    d["available_slots"] = s.available_slots;
    d["free_slots"] = s.free_slots;
    d["broken_slots"] = s.broken_slots;
    d["map_calls"] = s.map_calls;
    d["map_us"] = s.map_us;
    d["unmap_calls"] = s.unmap_calls;
    d["unmap_us"] = s.unmap_us;
    return d;
  }

  void close() {
    unregister_kv(id_);
    raise_if_failed(unlocked([&] { return cache_->close(); }));
  }

 private:
  int32_t checked(int32_t slot) const {
    if (slot >= 0 && slot < layout().num_slots) return slot;
    const std::string message = "there is no slot " + std::to_string(slot) + "; there are " +
                                std::to_string(layout().num_slots) + ", from 0";
    throw nb::value_error(message.c_str());
  }

  std::shared_ptr<KvCache> cache_;
  int32_t id_;
};

void bind_pool(nb::module_& m) {
  nb::class_<Pool>(m, "Pool",
                   "Physical memory under one limit, counted by owner to the byte. Thread-safe.")
      .def(nb::init<int64_t, int64_t>(), "chunk_bytes"_a, "limit_bytes"_a)
      .def_prop_ro("chunk_bytes", &Pool::chunk_bytes)
      .def("usage", &Pool::usage,
           "One consistent picture in bytes; free + kv + cache + activation + weights + workspace "
           "== limit.")
      .def("reset_peaks", &Pool::reset_peaks, "Starts the peak_* values of usage() anew.")
      .def(
          "reserve", &Pool::reserve, "owner"_a, "bytes"_a,
          "Counts bytes that are allocated elsewhere. Raises OutOfMemory and changes nothing where "
          "they do not fit.")
      .def("give_back", &Pool::give_back, "owner"_a, "bytes"_a,
           "Undoes reserve(), in any portions.")
      .def("trim", &Pool::trim, "keep_bytes"_a = 0,
           "Hands backed free memory beyond keep_bytes to the system; returns the bytes.")
      .def("resize", &Pool::resize, "limit_bytes"_a,
           "Sets the limit. Raises OutOfMemory below what is owned or available.");
}

void bind_layout(nb::module_& m) {
  nb::class_<KvLayout>(m, "KvLayout", "Where the K and V of a token lie. All sizes in bytes.")
      .def_static(
          "choose",
          [](int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t element_bytes,
             int64_t max_tokens, int64_t num_slots) {
            return value_or_raise(
                KvLayout::Choose(layers, kv_heads, head_dim, element_bytes, max_tokens, num_slots));
          },
          "layers"_a, "kv_heads"_a, "head_dim"_a, "element_bytes"_a, "max_tokens"_a, "num_slots"_a,
          "The layout that wastes least. Raises ValueError for sizes that cannot be.")
      .def_ro("layers", &KvLayout::layers)
      .def_ro("kv_heads", &KvLayout::kv_heads)
      .def_ro("head_dim", &KvLayout::head_dim)
      .def_ro("element_bytes", &KvLayout::element_bytes)
      .def_ro("tile_tokens", &KvLayout::tile_tokens)
      .def_ro("chunk_bytes", &KvLayout::chunk_bytes)
      .def_ro("slot_bytes", &KvLayout::slot_bytes)
      .def_ro("num_slots", &KvLayout::num_slots)
      .def_ro("max_tokens", &KvLayout::max_tokens)
      .def_prop_ro("token_bytes", &KvLayout::token_bytes)
      .def_prop_ro("reserved_bytes", &KvLayout::reserved_bytes)
      .def("chunks_for", &KvLayout::chunks_for, "tokens"_a);
}

void bind_kv_cache(nb::module_& m) {
  nb::class_<PyKvCache>(m, "KvCache",
                        "The slots of a model. Changed by one thread at a time; reading is free.")
      .def(nb::init<const Pool&, const KvLayout&>(), "pool"_a, "layout"_a)
      .def_prop_ro("id", &PyKvCache::id, "Its number in the registry, for custom calls.")
      .def_prop_ro("layout", &PyKvCache::layout, nb::rv_policy::copy)
      .def("take_slot", &PyKvCache::take_slot, "tokens"_a,
           "A slot for about `tokens` tokens: the best fit among the mapped ones. Maps nothing.")
      .def("extend", &PyKvCache::extend, "slots"_a, "tokens"_a,
           "Maps until slots[i] holds tokens[i] tokens, for all i or for none.")
      .def("truncate", &PyKvCache::truncate, "slot"_a, "tokens"_a,
           "Unmaps what `tokens` tokens do not need.")
      .def("release", &PyKvCache::release, "slot"_a,
           "Ends a request; its slot stays mapped until somebody needs the memory.")
      .def("reclaim", &PyKvCache::reclaim, "bytes"_a,
           "Unmaps available slots until `bytes` are back in the pool; returns the bytes given.")
      .def("trim_available", &PyKvCache::trim_available, "Unmaps all available slots.")
      .def("mapped_tokens", &PyKvCache::mapped_tokens, "slot"_a)
      .def("mapped_bytes", &PyKvCache::mapped_bytes, "slot"_a)
      .def("slot_state", &PyKvCache::slot_state, "slot"_a,
           "\"free\", \"active\", \"available\" or \"broken\".")
      .def("stats", &PyKvCache::stats)
      .def("close", &PyKvCache::close,
           "Unmaps everything and gives the addresses back. No step may be in flight.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Virtual tensors, KV slots and CPU kernels.";
  nb::exception<OutOfMemoryError>(m, "OutOfMemory", PyExc_RuntimeError);
  bind_pool(m);
  bind_layout(m);
  bind_kv_cache(m);
  m.def("ffi_registrations", &ffi_registrations, "FFI target name -> capsule of its handler.");
  m.def("cpu_isa", &cpu_isa, "The instruction set of the kernels in use.");
  m.def(
      "malloc_trim", [] { return unlocked([] { return malloc_trim(0) == 1; }); },
      "Gives unused heap back to the system; True if any went.");
}

}  // namespace ellm
