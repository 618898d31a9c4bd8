#include "memory/cuda_driver.h"

#include <utility>

#include "memory/text.h"

namespace ellm {
namespace {

cu::Address address(const std::byte* at) { return reinterpret_cast<cu::Address>(at); }

cu::AllocationProp pinned_on(const CudaDevice& device) {
  cu::AllocationProp prop{};
  prop.type = cu::kAllocationPinned;
  prop.location = {cu::kLocationDevice, device.ordinal()};
  return prop;
}

std::string chunks(size_t n, size_t chunk_bytes) {
  return std::to_string(n) + " chunks of " + human_bytes(chunk_bytes);
}

}  // namespace

Result<std::shared_ptr<CudaDriver>> CudaDriver::Create(std::shared_ptr<CudaDevice> device) {
  const CudaApi& api = device->api();
  const CudaDevice::Current current(*device);
  if (Status s = current.status(); !s.ok()) return s;
  int can_map = 0;
  auto code = api.device_attribute(&can_map, cu::kAttributeVirtualMemory, device->id());
  if (code == cu::kSuccess && can_map == 0) {
    return Status(Code::kDriver, device->name() +
                                     " has no virtual memory management, which the KV cache is "
                                     "built on; use a newer GPU or driver, or device=\"cpu\"");
  }
  size_t granularity = 0;
  const cu::AllocationProp prop = pinned_on(*device);
  if (code == cu::kSuccess) code = api.granularity(&granularity, &prop, cu::kGranularityMinimum);
  if (code != cu::kSuccess) {
    return cuda_error(api, code, "cannot ask " + device->name() + " how it maps memory");
  }
  return std::shared_ptr<CudaDriver>(new CudaDriver(std::move(device), granularity));
}

CudaDriver::~CudaDriver() {
  // What fails here is leaked until the process ends: there is nobody left to tell.
  if (!mapped_.all().empty() && !synchronize().ok()) return;
  for (const Piece& piece : mapped_.all()) (void)unmap(piece.at, piece.bytes);
  const CudaDevice::Current current(*device_);
  for (const auto& [handle, bytes] : memory_) (void)api_.release(handle);
  if (!mapped_.all().empty()) return;
  for (const auto& [base, bytes] : ranges_) (void)api_.address_free(address(base), bytes);
}

Status CudaDriver::error(cu::ReturnCode code, const std::string& what) const {
  return cuda_error(api_, code, what + " on " + device_->name());
}

Status CudaDriver::check_size(const char* verb, size_t bytes) const {
  if (bytes != 0 && bytes % granularity_bytes_ == 0) return Status::Ok();
  return Status(Code::kInvalid, std::string("cannot ") + verb + " " + human_bytes(bytes) + " on " +
                                    device_->name() + ": its memory comes in pieces of " +
                                    human_bytes(granularity_bytes_) + "; pass a positive multiple");
}

Status CudaDriver::reserve(size_t bytes, size_t alignment, std::byte** base) {
  if (Status s = check_size("reserve", bytes); !s.ok()) return s;
  if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
    return Status(Code::kInvalid, "an alignment of " + std::to_string(alignment) +
                                      " is not a power of two; pass the chunk size");
  }
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  cu::Address got = 0;
  const size_t aligned_to = alignment < granularity_bytes_ ? granularity_bytes_ : alignment;
  if (const auto code = api_.address_reserve(&got, bytes, aligned_to, 0, 0); code != cu::kSuccess) {
    return error(code, "cannot reserve " + human_bytes(bytes) +
                           " of addresses (fewer or shorter slots need less)");
  }
  *base = reinterpret_cast<std::byte*>(got);
  std::lock_guard<std::mutex> lock(mutex_);
  ranges_.emplace(*base, bytes);
  return Status::Ok();
}

Status CudaDriver::release(std::byte* base, size_t bytes) {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  if (const auto code = api_.address_free(address(base), bytes); code != cu::kSuccess) {
    return error(code, "cannot release " + human_bytes(bytes) + " of addresses");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  ranges_.erase(base);
  return Status::Ok();
}

Status CudaDriver::create(size_t bytes, Handle* handle) {
  if (Status s = check_size("create", bytes); !s.ok()) return s;
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  cu::Allocation allocation = 0;
  const cu::AllocationProp prop = pinned_on(*device_);
  if (const auto code = api_.create(&allocation, bytes, &prop, 0); code != cu::kSuccess) {
    return error(code, "cannot take " + human_bytes(bytes) + " of memory");
  }
  *handle = allocation;
  std::lock_guard<std::mutex> lock(mutex_);
  memory_.emplace(allocation, bytes);
  return Status::Ok();
}

Status CudaDriver::known(const Handle* handles, size_t n, size_t bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    const auto it = memory_.find(handles[i]);
    if (it != memory_.end() && it->second == bytes) continue;
    return Status(Code::kInvalid, "there is no memory on " + device_->name() + " with handle " +
                                      std::to_string(handles[i]) + " and " + human_bytes(bytes));
  }
  return Status::Ok();
}

Status CudaDriver::destroy(Handle handle, size_t bytes) {
  if (Status s = known(&handle, 1, bytes); !s.ok()) return s;
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  {
    // First, because once it is released another thread may get the same handle.
    std::lock_guard<std::mutex> lock(mutex_);
    memory_.erase(handle);
  }
  if (const auto code = api_.release(handle); code != cu::kSuccess) {
    std::lock_guard<std::mutex> lock(mutex_);
    memory_.emplace(handle, bytes);
    return error(code, "cannot give " + human_bytes(bytes) + " of memory back");
  }
  return Status::Ok();
}

Status CudaDriver::map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) {
  if (Status s = map_only(at, handles, n, chunk_bytes); !s.ok()) return s;
  const Status s = allow_access(at, n * chunk_bytes);
  return s.ok() ? s : undo(at, n * chunk_bytes, s);
}

Status CudaDriver::map_only(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) {
  if (Status s = check_size("map", chunk_bytes); !s.ok()) return s;
  if (Status s = known(handles, n, chunk_bytes); !s.ok()) return s;
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  for (size_t i = 0; i < n; ++i) {
    std::byte* const here = at + i * chunk_bytes;
    const auto code = api_.map(address(here), chunk_bytes, 0, handles[i], 0);
    if (code != cu::kSuccess) {
      return undo(at, i * chunk_bytes, error(code, "cannot map " + chunks(n, chunk_bytes)));
    }
    mapped_.add({here, chunk_bytes});
  }
  return Status::Ok();
}

Status CudaDriver::allow_access(std::byte* at, size_t bytes) {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  const cu::AccessDesc access{{cu::kLocationDevice, device_->ordinal()}, cu::kAccessReadWrite};
  const auto code = api_.set_access(address(at), bytes, &access, 1);
  if (code == cu::kSuccess) return Status::Ok();
  return error(code, "cannot make " + human_bytes(bytes) + " of mapped memory accessible");
}

Status CudaDriver::undo(std::byte* at, size_t bytes, const Status& failure) {
  if (bytes == 0) return failure;
  const Status undone = unmap(at, bytes);
  if (undone.ok()) return failure;
  return Status(Code::kBroken, failure.message() + "; then " + undone.message());
}

Status CudaDriver::unmap(std::byte* at, size_t bytes) {
  if (Status s = check_size("unmap", bytes); !s.ok()) return s;
  const auto pieces = mapped_.inside(at, bytes);
  if (!pieces.ok()) return pieces.status();
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  Status first = Status::Ok();
  std::vector<Piece> run;
  for (const Piece& piece : pieces.value()) {
    if (!run.empty() && run.back().at + run.back().bytes != piece.at) {
      if (Status s = unmap_run(run); !s.ok() && first.ok()) first = std::move(s);
      run.clear();
    }
    run.push_back(piece);
  }
  if (run.empty()) return first;
  Status last = unmap_run(run);
  return first.ok() ? last : first;
}

Status CudaDriver::unmap_run(const std::vector<Piece>& run) {
  const size_t bytes = static_cast<size_t>(run.back().at + run.back().bytes - run.front().at);
  const auto code = api_.unmap(address(run.front().at), bytes);
  if (code == cu::kSuccess) {
    mapped_.remove(run);
    return Status::Ok();
  }
  // Nobody says how far it got, so each chunk is tried alone, and asked for.
  std::vector<Piece> gone;
  for (const Piece& piece : run) {
    const bool unmapped =
        run.size() > 1 && api_.unmap(address(piece.at), piece.bytes) == cu::kSuccess;
    if (unmapped || !may_be_mapped(piece.at)) gone.push_back(piece);
  }
  mapped_.remove(gone);
  if (gone.size() == run.size()) return Status::Ok();
  return error(code, "cannot unmap " + human_bytes(bytes));
}

bool CudaDriver::may_be_mapped(std::byte* at) const {
  cu::Allocation allocation;
  const auto code = api_.retain(&allocation, at);
  if (code == cu::kSuccess) (void)api_.release(allocation);
  return code != cu::kInvalidValue;
}

Status CudaDriver::synchronize() {
  const CudaDevice::Current current(*device_);
  if (Status s = current.status(); !s.ok()) return s;
  if (const auto code = api_.context_synchronize(); code != cu::kSuccess) {
    return error(code, "some of the work that was started has failed");
  }
  return Status::Ok();
}

}  // namespace ellm
