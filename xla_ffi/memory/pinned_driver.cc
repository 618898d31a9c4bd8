#include "memory/pinned_driver.h"

#include "memory/text.h"

namespace ellm {

PinnedDriver::~PinnedDriver() {
  const CudaDevice::Current current(*device_);
  for (const Piece& piece : pinned_.all()) (void)device_->api().host_unregister(piece.at);
}

Status PinnedDriver::pin(std::byte* at, size_t n, size_t chunk_bytes) {
  for (size_t i = 0; i < n; ++i) {
    std::byte* const here = at + i * chunk_bytes;
    const auto code = device_->api().host_register(here, chunk_bytes, cu::kRegisterPortable);
    if (code != cu::kSuccess) {
      return cuda_error(device_->api(), code,
                        "cannot pin " + human_bytes(chunk_bytes) + " of host memory for " +
                            device_->name() + " (less host_memory needs less)");
    }
    pinned_.add({here, chunk_bytes});
  }
  return Status::Ok();
}

Status PinnedDriver::unpin(std::byte* at, size_t bytes) {
  const auto pieces = pinned_.inside(at, bytes);
  if (!pieces.ok()) return pieces.status();
  Status first = Status::Ok();
  for (const Piece& piece : pieces.value()) {
    const auto code = device_->api().host_unregister(piece.at);
    // An earlier try may have told an error of somebody else's and done its work even so.
    if (code == cu::kSuccess || code == cu::kNotRegistered) {
      pinned_.remove({piece});
    } else if (first.ok()) {
      first = cuda_error(device_->api(), code,
                         "cannot unpin " + human_bytes(piece.bytes) + " of host memory");
    }
  }
  return first;
}

Status PinnedDriver::map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  if (Status s = host_->map(at, handles, n, chunk_bytes); !s.ok()) return s;
  Status failure = pin(at, n, chunk_bytes);
  if (failure.ok()) return failure;
  const Status undone = unmap(at, n * chunk_bytes);
  if (undone.ok()) return failure;
  return Status(Code::kBroken, failure.message() + "; then " + undone.message());
}

Status PinnedDriver::unmap(std::byte* at, size_t bytes) {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  if (Status s = unpin(at, bytes); !s.ok()) return s;
  return host_->unmap(at, bytes);
}

}  // namespace ellm
