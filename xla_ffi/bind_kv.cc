// KvLayout and KvCache as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kv/registry.h"
#include "kv/step.h"
#include "wrappers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {
namespace {

void check_pairs(const char* call, size_t slots, size_t tokens) {
  if (slots == tokens) return;
  const std::string message = std::string(call) + " got " + std::to_string(slots) + " slots and " +
                              std::to_string(tokens) + " token counts; pass one count per slot";
  throw nb::value_error(message.c_str());
}

void bind_layout(nb::module_& m) {
  nb::class_<KvLayout>(m, "KvLayout", "Where the K and V of a token lie. All sizes in bytes.")
      .def_static(
          "choose",
          [](int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t element_bytes,
             int64_t max_tokens, int64_t num_slots, int64_t granularity_bytes,
             int64_t scale_bytes) {
            return value_or_raise(KvLayout::Choose(layers, kv_heads, head_dim, element_bytes,
                                                   max_tokens, num_slots, granularity_bytes,
                                                   scale_bytes));
          },
          "layers"_a, "kv_heads"_a, "head_dim"_a, "element_bytes"_a, "max_tokens"_a, "num_slots"_a,
          "granularity_bytes"_a = 4096, "scale_bytes"_a = 0,
          "The layout that wastes least. Raises ValueError for sizes that cannot be.")
      .def_ro("layers", &KvLayout::layers)
      .def_ro("kv_heads", &KvLayout::kv_heads)
      .def_ro("head_dim", &KvLayout::head_dim)
      .def_ro("element_bytes", &KvLayout::element_bytes)
      .def_ro("scale_bytes", &KvLayout::scale_bytes)
      .def_ro("tile_tokens", &KvLayout::tile_tokens)
      .def_ro("chunk_bytes", &KvLayout::chunk_bytes)
      .def_ro("slot_bytes", &KvLayout::slot_bytes)
      .def_ro("num_slots", &KvLayout::num_slots)
      .def_ro("max_tokens", &KvLayout::max_tokens)
      .def_prop_ro("token_bytes", &KvLayout::token_bytes)
      .def_prop_ro("reserved_bytes", &KvLayout::reserved_bytes)
      .def("chunks_for", &KvLayout::chunks_for, "tokens"_a);
}

using StepWords = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_step_of(const PyKvCache& kv, const StepWords& metadata) {
  const StepView step = value_or_raise(view_step(metadata.data(), metadata.shape(0)));
  raise_if_failed(check_step(*kv.get(), step));
}

void bind_cache(nb::module_& m) {
  nb::class_<PyKvCache>(m, "KvCache",
                        "The slots of a model. Changed by one thread at a time; reading is free.")
      .def(nb::init<const PyPool&, const KvLayout&>(), "pool"_a, "layout"_a)
      .def_prop_ro("id", &PyKvCache::id, "Its number in the registry, for custom calls.")
      .def_prop_ro("layout", &PyKvCache::layout, nb::rv_policy::copy)
      .def("take_slot", &PyKvCache::take_slot, "tokens"_a,
           "A slot for about `tokens` tokens: the best fit among the mapped ones. Maps nothing.")
      .def("take", &PyKvCache::take, "slot"_a,
           "That very slot, for several caches that are to give a request the same one.")
      .def("take_empty_slot", &PyKvCache::take_empty_slot,
           "A slot with nothing mapped; unmaps the smallest available one where none is free.")
      .def("extend", &PyKvCache::extend, "slots"_a, "tokens"_a,
           "Maps until slots[i] holds tokens[i] tokens, for all i or for none.")
      .def("premap", &PyKvCache::premap, "slots"_a, "tokens"_a,
           "Takes what can be had at once of the chunks that extend() would map, and has them "
           "mapped "
           "by another thread; returns how many.")
      .def("map_shared", &PyKvCache::map_shared, "slot"_a, "ids"_a,
           "Maps these chunks as the first ones of a slot with nothing mapped; all or nothing.")
      .def("slot_chunks", &PyKvCache::slot_chunks, "slot"_a, "begin"_a, "end"_a,
           "Ids of the mapped chunks [begin, end) of a slot.")
      .def("truncate", &PyKvCache::truncate, "slot"_a, "tokens"_a,
           "Unmaps what `tokens` tokens do not need.")
      .def("release", &PyKvCache::release, "slot"_a,
           "Ends a request; its slot stays mapped until somebody needs the memory.")
      .def("release_async", &PyKvCache::release_async, "slot"_a,
           "release() that leaves the unmapping to another thread.")
      .def("settle", &PyKvCache::settle, "Waits for what premap and release_async have begun.")
      .def("reclaim", &PyKvCache::reclaim, "bytes"_a,
           "Unmaps available slots until `bytes` are back in the pool; returns the bytes given.")
      .def("trim_available", &PyKvCache::trim_available, "Unmaps all available slots.")
      .def("mapped_tokens", &PyKvCache::mapped_tokens, "slot"_a)
      .def("mapped_bytes", &PyKvCache::mapped_bytes, "slot"_a)
      .def("slot_state", &PyKvCache::slot_state, "slot"_a,
           "\"free\", \"active\", \"available\", \"dying\" or \"broken\".")
      .def("check_step", &check_step_of, "metadata"_a.noconvert(),
           "Raises unless everything that a step with this metadata touches is mapped.")
      .def("stats", &PyKvCache::stats)
      .def("close", &PyKvCache::close,
           "Unmaps everything and gives the addresses back. No step may be in flight.");
}

// The number of a group, for as long as the Python object lives.
class PyKvGroup {
 public:
  PyKvGroup(const std::vector<const PyKvCache*>& caches, const std::vector<int32_t>& devices) {
    std::map<int32_t, int32_t> ids_by_device;
    for (size_t i = 0; i < std::min(caches.size(), devices.size()); ++i) {
      if (caches[i] != nullptr) ids_by_device.emplace(devices[i], caches[i]->id());
    }
    if (caches.empty() || ids_by_device.size() != caches.size() ||
        ids_by_device.size() != devices.size()) {
      throw nb::value_error("a group of KV caches needs one device for each, none of them twice");
    }
    id_ = value_or_raise(register_kv_group(std::move(ids_by_device)));
  }
  ~PyKvGroup() { unregister_kv(id_); }
  PyKvGroup(const PyKvGroup&) = delete;
  PyKvGroup& operator=(const PyKvGroup&) = delete;

  int32_t id() const { return id_; }

 private:
  int32_t id_;
};

void bind_group(nb::module_& m) {
  nb::class_<PyKvGroup>(m, "KvGroup", "One number for the KV caches of several devices.")
      .def(nb::init<const std::vector<const PyKvCache*>&, const std::vector<int32_t>&>(),
           "caches"_a, "device_ordinals"_a)
      .def_prop_ro("id", &PyKvGroup::id, "Its number in the registry, for custom calls.");
}

}  // namespace

PyKvCache::PyKvCache(const PyPool& pool, const KvLayout& layout)
    : device_(pool.device()),
      cache_(value_or_raise(unlocked([&] { return KvCache::Create(pool.get(), layout); }))),
      id_(register_kv(cache_)) {}

PyKvCache::~PyKvCache() {
  end_unlocked([&] {
    unregister_kv(id_);
    cache_.reset();
  });
}

int32_t PyKvCache::take_slot(int64_t tokens) {
  return value_or_raise(unlocked([&] { return cache_->take_slot(tokens); }));
}

void PyKvCache::take(int32_t slot) {
  raise_if_failed(unlocked([&] { return cache_->take(slot); }));
}

int32_t PyKvCache::take_empty_slot() {
  return value_or_raise(unlocked([&] { return cache_->take_empty_slot(); }));
}

void PyKvCache::extend(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens) {
  check_pairs("extend", slots.size(), tokens.size());
  raise_if_failed(
      unlocked([&] { return cache_->extend(slots.size(), slots.data(), tokens.data()); }));
}

size_t PyKvCache::premap(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens) {
  check_pairs("premap", slots.size(), tokens.size());
  return value_or_raise(cache_->premap(slots.size(), slots.data(), tokens.data()));
}

void PyKvCache::map_shared(int32_t slot, const std::vector<ChunkId>& ids) {
  raise_if_failed(unlocked([&] { return cache_->map_shared(slot, ids); }));
}

std::vector<ChunkId> PyKvCache::slot_chunks(int32_t slot, int64_t begin, int64_t end) const {
  const std::vector<ChunkId>& chunks =
      *unlocked([&, known = checked(slot)] { return &cache_->slot_chunks(known); });
  if (begin < 0 || begin > end || end > static_cast<int64_t>(chunks.size())) {
    const std::string message = "chunks " + std::to_string(begin) + " to " + std::to_string(end) +
                                " were asked for; slot " + std::to_string(slot) + " has " +
                                std::to_string(chunks.size()) + ", from 0";
    throw nb::value_error(message.c_str());
  }
  return {chunks.begin() + begin, chunks.begin() + end};
}

void PyKvCache::truncate(int32_t slot, int64_t tokens) {
  raise_if_failed(unlocked([&] { return cache_->truncate(slot, tokens); }));
}

void PyKvCache::release(int32_t slot) {
  raise_if_failed(unlocked([&] { return cache_->release(slot); }));
}

void PyKvCache::release_async(int32_t slot) {
  raise_if_failed(unlocked([&] { return cache_->release_async(slot); }));
}

void PyKvCache::settle() {
  raise_if_failed(unlocked([&] { return cache_->settle(); }));
}

size_t PyKvCache::reclaim(int64_t bytes) {
  const size_t n = non_negative("bytes", bytes);
  return value_or_raise(unlocked([&] { return cache_->reclaim(n); }));
}

size_t PyKvCache::trim_available() {
  return value_or_raise(unlocked([&] { return cache_->trim_available(); }));
}

nb::dict PyKvCache::stats() const {
  const KvStats s = cache_->stats();
  nb::dict d;
  d["active_bytes"] = s.active_bytes;
  d["available_bytes"] = s.available_bytes;
  d["dying_bytes"] = s.dying_bytes;
  d["broken_bytes"] = s.broken_bytes;
  d["active_slots"] = s.active_slots;
  d["available_slots"] = s.available_slots;
  d["free_slots"] = s.free_slots;
  d["dying_slots"] = s.dying_slots;
  d["broken_slots"] = s.broken_slots;
  d["map_calls"] = s.map_calls;
  d["map_us"] = s.map_us;
  d["unmap_calls"] = s.unmap_calls;
  d["unmap_us"] = s.unmap_us;
  return d;
}

void PyKvCache::close() {
  unregister_kv(id_);
  raise_if_failed(unlocked([&] { return cache_->close(); }));
}

int32_t PyKvCache::checked(int32_t slot) const {
  if (slot >= 0 && slot < layout().num_slots) return slot;
  const std::string message = "there is no slot " + std::to_string(slot) + "; there are " +
                              std::to_string(layout().num_slots) + ", from 0";
  throw nb::value_error(message.c_str());
}

void bind_kv(nb::module_& m) {
  bind_layout(m);
  bind_cache(m);
  bind_group(m);
}

}  // namespace ellm
