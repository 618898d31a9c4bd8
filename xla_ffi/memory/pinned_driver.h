// Host memory that CUDA devices copy from and to directly.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "memory/cuda_device.h"
#include "memory/driver.h"
#include "memory/piece_table.h"

namespace ellm {

// A driver over another one's host memory, whose chunks are registered with CUDA (page-locked, for
// all devices) while they are mapped. map() takes its time for that, so it is for memory that
// stays.
class PinnedDriver : public Driver {
 public:
  PinnedDriver(std::shared_ptr<Driver> host, std::shared_ptr<CudaDevice> device)
      : host_(std::move(host)), device_(std::move(device)) {}
  // Nothing stays registered, whatever becomes of the memory.
  ~PinnedDriver() override;

  size_t granularity_bytes() const override { return host_->granularity_bytes(); }
  Status reserve(size_t bytes, size_t alignment, std::byte** base) override {
    return host_->reserve(bytes, alignment, base);
  }
  Status release(std::byte* base, size_t bytes) override { return host_->release(base, bytes); }
  Status create(size_t bytes, Handle* handle) override { return host_->create(bytes, handle); }
  Status destroy(Handle handle, size_t bytes) override { return host_->destroy(handle, bytes); }
  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override;
  Status unmap(std::byte* at, size_t bytes) override;

 private:
  // The context is current in these.
  Status pin(std::byte* at, size_t n, size_t chunk_bytes);
  Status unpin(std::byte* at, size_t bytes);

  const std::shared_ptr<Driver> host_;
  const std::shared_ptr<CudaDevice> device_;
  PieceTable pinned_;
};

}  // namespace ellm
