// Copies between chunks on a CUDA device and pinned host memory, on two streams of their own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory/copy_link.h"
#include "memory/cuda_device.h"

namespace ellm {

// The streams do not wait for XLA's, nor XLA's for them, so that copies run beside kernels. The
// order is the host's: an offload begins when the host has the results of the step that wrote the
// chunks, and a step that reads fetched chunks is started after finish().
class CudaLink : public CopyLink {
 public:
  // Errors: kDriver.
  static Result<std::unique_ptr<CudaLink>> Create(std::shared_ptr<CudaDevice> device);
  // finish() was called for both directions.
  ~CudaLink() override;

  bool duplex() const override { return true; }
  // Up to kDepth copies are under way in each direction; then it waits for the oldest.
  Status begin(CopyDirection direction, std::byte* chunk, std::byte* block, size_t bytes) override;
  Status finish(CopyDirection direction) override;

  static constexpr size_t kDepth = 8;

 private:
  struct Lane {
    cu::Stream stream = nullptr;
    std::array<cu::Event, kDepth> events{};  // Of copy i: events[i % kDepth].
    uint64_t begun = 0;
    uint64_t over = 0;
    bool unknown = false;  // Something may be under way of which no event tells.
  };

  explicit CudaLink(std::shared_ptr<CudaDevice> device)
      : device_(std::move(device)), api_(device_->api()) {}

  Lane& lane(CopyDirection direction) { return lanes_[static_cast<size_t>(direction)]; }
  // The context is current in the functions below.
  Status make_lanes();
  // Waits until the first `copies` are over; the device does them in order.
  Status wait(Lane* lane, uint64_t copies);
  // Waits for all of the lane without its events. `failure`, or kBroken if that is refused too.
  Status drain(Lane* lane, const Status& failure);
  bool synchronize_device();
  Status error(cu::ReturnCode code, const char* what) const;

  const std::shared_ptr<CudaDevice> device_;
  const CudaApi& api_;
  std::array<Lane, 2> lanes_;
};

}  // namespace ellm
