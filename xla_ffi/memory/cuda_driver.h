// Driver over the memory of a CUDA device (virtual memory management of the driver API).
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory/cuda_device.h"
#include "memory/driver.h"
#include "memory/piece_table.h"

namespace ellm {

// A handle is what cuMemCreate returns: memory pinned on the device, which lasts until cuMemRelease
// and the last cuMemUnmap. Mapping costs one cuMemMap per chunk and one cuMemSetAccess per call,
// unmapping one cuMemUnmap per run of neighbours.
//
// Why no unmap meets a running kernel or copy, without an event of our own:
//  - A slot is unmapped when it is released or truncated, which the host loop does when no step in
//    flight names it. A step is in flight until the host has its results, and those are ready when
//    an event that XLA records on its stream after the step's last kernel has passed. So the order
//    is made by that event, and it was seen on the host before the unmap begins, on whatever
//    thread. We could record none on XLA's stream but inside of a custom call, where a captured
//    graph would swallow it; and an event for the whole context (cuCtxRecordEvent) breaks a capture
//    under way and waits for the step that runs now, which does not touch the slot.
//  - Chunks that are copied stay mapped until the copy is done: the caller of Copier keeps them,
//    and the copier says "done" when the event after the last copy has passed.
//  - Kernels touch no KV but that of the slots that their step names.
// Nobody has waited in two cases: a step that failed half-way, of which kernels may still run, and
// the end of a cache with who knows what in flight. There synchronize() is called first: by
// KvCache::close(), and by whoever gets a failed step (Recovery in recovery.py). It waits for all
// work of the process on the device, so it is called nowhere else.
//
// One chunk at two addresses: a kernel that writes through one of them is seen through the other by
// kernels that start after it has ended. Chunks are shared when they are full and the step that
// filled them is over, so that nobody relies on more.
class CudaDriver : public Driver {
 public:
  // Errors: kDriver, also where the device cannot map memory.
  static Result<std::shared_ptr<CudaDriver>> Create(std::shared_ptr<CudaDevice> device);
  // Gives back whatever is left: after waiting for the device where something is mapped, and where
  // that fails not even that, because it may still be touched.
  ~CudaDriver() override;

  size_t granularity_bytes() const override { return granularity_bytes_; }
  Reach reach() const override { return Reach::kDevice; }
  int ordinal() const override { return device_->ordinal(); }
  Status reserve(size_t bytes, size_t alignment, std::byte** base) override;
  Status release(std::byte* base, size_t bytes) override;
  Status create(size_t bytes, Handle* handle) override;
  Status destroy(Handle handle, size_t bytes) override;
  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override;
  Status unmap(std::byte* at, size_t bytes) override;
  Status synchronize() override;

  // The halves of map(), to be timed. What was mapped cannot be touched before the second. Errors
  // as map(); after a failure of the second the chunks stay mapped.
  Status map_only(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes);
  Status allow_access(std::byte* at, size_t bytes);

  const std::shared_ptr<CudaDevice>& device() const { return device_; }

 private:
  CudaDriver(std::shared_ptr<CudaDevice> device, size_t granularity_bytes)
      : device_(std::move(device)), api_(device_->api()), granularity_bytes_(granularity_bytes) {}

  Status check_size(const char* verb, size_t bytes) const;
  Status error(cu::ReturnCode code, const std::string& what) const;
  Status known(const Handle* handles, size_t n, size_t bytes) const;
  // Unmaps what was mapped of a call that failed; `failure`, or kBroken if that fails too.
  Status undo(std::byte* at, size_t bytes, const Status& failure);
  // The context is current in the functions below.
  Status unmap_run(const std::vector<Piece>& run);
  bool may_be_mapped(std::byte* at) const;

  const std::shared_ptr<CudaDevice> device_;
  const CudaApi& api_;
  const size_t granularity_bytes_;
  PieceTable mapped_;
  mutable std::mutex mutex_;
  std::unordered_map<Handle, size_t> memory_;  // Bytes by handle.
  std::map<std::byte*, size_t> ranges_;        // Bytes by base.
};

}  // namespace ellm
