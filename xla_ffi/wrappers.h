// The objects behind the Python classes Pool and KvCache, for bindings that take them as arguments.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kv/kv_cache.h"
#include "memory/chunk_pool.h"
#include "memory/sim_driver.h"

namespace ellm {

// A pool over the memory of a device, or over none.
class PyPool {
 public:
  PyPool(int64_t chunk_bytes, int64_t limit_bytes, const std::string& device);
  static PyPool simulated(int64_t chunk_bytes, int64_t limit_bytes);
  PyPool(PyPool&&) = default;
  ~PyPool();

  const std::shared_ptr<ChunkPool>& get() const { return pool_; }
  // "simulated" for a pool over no memory.
  const std::string& device() const { return device_; }

  void reserve(const std::string& owner, int64_t bytes);
  void give_back(const std::string& owner, int64_t bytes);
  void cache(const std::vector<ChunkId>& ids);
  size_t uncache(const std::vector<ChunkId>& ids);
  size_t trim(int64_t keep_bytes);
  void resize(int64_t limit_bytes);
  void back_ahead(int64_t bytes);
  void synchronize();
  nanobind::dict usage() const;
  void reset_peaks() { pool_->reset_peaks(); }

  void inject_faults(uint64_t seed, double rate);
  void fail_call(int64_t n);
  uint64_t driver_calls() const { return simulator().calls(); }

 private:
  PyPool(std::shared_ptr<SimDriver> simulator, int64_t chunk_bytes, int64_t limit_bytes);
  SimDriver& simulator() const;

  std::string device_;
  std::shared_ptr<SimDriver> simulator_;  // Null over a device's memory.
  std::shared_ptr<ChunkPool> pool_;
};

// A KV cache with its number in the registry, closed with the Python object.
class PyKvCache {
 public:
  PyKvCache(const PyPool& pool, const KvLayout& layout);
  ~PyKvCache();
  PyKvCache(const PyKvCache&) = delete;
  PyKvCache& operator=(const PyKvCache&) = delete;

  const std::shared_ptr<KvCache>& get() const { return cache_; }
  int32_t id() const { return id_; }
  // Of its pool.
  const std::string& device() const { return device_; }
  const KvLayout& layout() const { return cache_->layout(); }

  int32_t take_slot(int64_t tokens);
  void take(int32_t slot);
  int32_t take_empty_slot();
  void extend(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens);
  size_t premap(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens);
  void map_shared(int32_t slot, const std::vector<ChunkId>& ids);
  std::vector<ChunkId> slot_chunks(int32_t slot, int64_t begin, int64_t end) const;
  void truncate(int32_t slot, int64_t tokens);
  void release(int32_t slot);
  void release_async(int32_t slot);
  void settle();
  size_t reclaim(int64_t bytes);
  size_t trim_available();
  void close();

  int64_t mapped_tokens(int32_t slot) const { return cache_->mapped_tokens(checked(slot)); }
  size_t mapped_bytes(int32_t slot) const { return cache_->mapped_bytes(checked(slot)); }
  std::string slot_state(int32_t slot) const {
    return slot_state_name(cache_->slot_state(checked(slot)));
  }
  nanobind::dict stats() const;

 private:
  int32_t checked(int32_t slot) const;

  std::string device_;
  std::shared_ptr<KvCache> cache_;
  int32_t id_;
};

}  // namespace ellm
