#include "memory/cuda_link.h"

#include <string>
#include <utility>

namespace ellm {
namespace {

cu::Address address(const std::byte* at) { return reinterpret_cast<cu::Address>(at); }

}  // namespace

Result<std::unique_ptr<CudaLink>> CudaLink::Create(std::shared_ptr<CudaDevice> device) {
  std::unique_ptr<CudaLink> link(new CudaLink(std::move(device)));
  const CudaDevice::Current current(*link->device_);
  if (Status s = current.status(); !s.ok()) return s;
  if (Status s = link->make_lanes(); !s.ok()) return s;
  return link;
}

Status CudaLink::make_lanes() {
  for (Lane& lane : lanes_) {
    if (const auto code = api_.stream_create(&lane.stream, cu::kStreamNonBlocking);
        code != cu::kSuccess) {
      return error(code, "cannot make a stream for copies");
    }
    for (cu::Event& event : lane.events) {
      // The thread that waits sleeps: it has nothing else to do, and others need the core.
      const auto code = api_.event_create(&event, cu::kEventBlockingSync | cu::kEventDisableTiming);
      if (code != cu::kSuccess) return error(code, "cannot make an event for copies");
    }
  }
  return Status::Ok();
}

CudaLink::~CudaLink() {
  const CudaDevice::Current current(*device_);
  for (const Lane& lane : lanes_) {
    for (const cu::Event event : lane.events) {
      if (event != nullptr) (void)api_.event_destroy(event);
    }
    if (lane.stream != nullptr) (void)api_.stream_destroy(lane.stream);
  }
}

Status CudaLink::error(cu::ReturnCode code, const char* what) const {
  return cuda_error(api_, code, std::string(what) + " on " + device_->name());
}

bool CudaLink::synchronize_device() {
  const CudaDevice::Current current(*device_);
  return current.status().ok() && api_.context_synchronize() == cu::kSuccess;
}

Status CudaLink::drain(Lane* lane, const Status& failure) {
  lane->unknown = api_.stream_synchronize(lane->stream) != cu::kSuccess && !synchronize_device();
  if (lane->unknown) {
    return Status(Code::kBroken, failure.message() + "; whether it is over cannot be told");
  }
  lane->over = lane->begun;
  return failure;
}

Status CudaLink::wait(Lane* lane, uint64_t copies) {
  if (lane->unknown) {
    return drain(lane, Status(Code::kDriver, "a copy between device and host memory on " +
                                                 device_->name() + " may have failed"));
  }
  if (copies <= lane->over) return Status::Ok();
  const auto code = api_.event_synchronize(lane->events[(copies - 1) % kDepth]);
  if (code == cu::kSuccess) {
    lane->over = copies;
    return Status::Ok();
  }
  return drain(lane, error(code, "a copy between device and host memory failed"));
}

Status CudaLink::begin(CopyDirection direction, std::byte* chunk, std::byte* block, size_t bytes) {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  Lane& lane = this->lane(direction);
  if (lane.unknown || lane.begun - lane.over == kDepth) {
    if (Status s = wait(&lane, lane.over + 1); !s.ok()) return s;
  }
  auto code = direction == CopyDirection::kOffload
                  ? api_.copy_to_host(block, address(chunk), bytes, lane.stream)
                  : api_.copy_to_device(address(chunk), block, bytes, lane.stream);
  if (code != cu::kSuccess) return error(code, "cannot copy between device and host memory");
  code = api_.event_record(lane.events[lane.begun % kDepth], lane.stream);
  if (code == cu::kSuccess) {
    ++lane.begun;
    return Status::Ok();
  }
  return drain(&lane, error(code, "cannot follow a copy between device and host memory"));
}

Status CudaLink::finish(CopyDirection direction) {
  Lane& lane = this->lane(direction);
  if (lane.begun == lane.over && !lane.unknown) return Status::Ok();
  // Whatever becomes of the context: nobody may go on before the copies are over.
  const CudaDevice::Current current(*device_);
  return wait(&lane, lane.begun);
}

}  // namespace ellm
