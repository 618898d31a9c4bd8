#include "memory/virtual_tensor.h"

#include <chrono>
#include <string>
#include <utility>

namespace ellm {
namespace {

// Adds the time until its end to a counter, and one call to another.
class CallTimer {
 public:
  CallTimer(std::atomic<uint64_t>* calls, std::atomic<uint64_t>* ns)
      : calls_(calls), ns_(ns), start_(std::chrono::steady_clock::now()) {}
  ~CallTimer() {
    const auto spent = std::chrono::steady_clock::now() - start_;
    ns_->fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count(),
                   std::memory_order_relaxed);
    calls_->fetch_add(1, std::memory_order_relaxed);
  }

 private:
  std::atomic<uint64_t>* calls_;
  std::atomic<uint64_t>* ns_;
  std::chrono::steady_clock::time_point start_;
};

Status wrong_state(const char* verb, TensorState state) {
  return Status(Code::kInvalid, std::string("cannot ") + verb + " a virtual tensor that is " +
                                    tensor_state_name(state) +
                                    (state == TensorState::kBroken ? "; repair it first" : ""));
}

}  // namespace

const char* tensor_state_name(TensorState state) {
  switch (state) {
    case TensorState::kReserved:
      return "reserved";
    case TensorState::kMapped:
      return "mapped";
    case TensorState::kBroken:
      return "broken";
    case TensorState::kReleased:
      return "released";
  }
  return "unknown";
}

VirtualTensor::VirtualTensor(ChunkPool* pool, MapStats* stats, std::byte* base,
                             size_t capacity_chunks)
    : pool_(pool), stats_(stats), base_(base), capacity_chunks_(capacity_chunks) {}

VirtualTensor::VirtualTensor(VirtualTensor&& other) noexcept
    : pool_(other.pool_),
      stats_(other.stats_),
      base_(other.base_),
      capacity_chunks_(other.capacity_chunks_),
      chunks_(std::move(other.chunks_)),
      state_(std::exchange(other.state_, TensorState::kReleased)),
      kind_(other.kind_) {
  other.chunks_.clear();
}

// Chunks that cannot be unmapped even now keep their references, so that nobody gets them.
VirtualTensor::~VirtualTensor() { (void)release(); }

Status VirtualTensor::extend(const std::vector<ChunkId>& ids) {
  Status failure = Status::Ok();
  std::vector<Handle> handles;
  if (state_ != TensorState::kReserved && state_ != TensorState::kMapped) {
    failure = wrong_state("extend", state_);
  } else if (ids.size() > capacity_chunks_ - chunks_.size()) {
    failure = Status(Code::kInvalid, "cannot map " + std::to_string(ids.size()) +
                                         " more chunks: " + std::to_string(chunks_.size()) +
                                         " of " + std::to_string(capacity_chunks_) +
                                         " are mapped; reserve a longer segment");
  } else if (ids.empty()) {
    return Status::Ok();
  } else {
    handles.reserve(ids.size());
    for (const ChunkId id : ids) {
      Result<Handle> handle = pool_->handle(id);
      if (!handle.ok()) {
        failure = handle.status();
        break;
      }
      handles.push_back(handle.value());
    }
  }
  if (failure.ok()) {
    const size_t chunk_bytes = pool_->chunk_bytes();
    CallTimer timer(&stats_->map_calls, &stats_->map_ns);
    failure = pool_->driver().map(base_ + chunks_.size() * chunk_bytes, handles.data(),
                                  handles.size(), chunk_bytes);
  }
  if (!failure.ok() && failure.code() != Code::kBroken) {
    (void)pool_->release(ids);  // The first error is the one to report.
    return failure;
  }
  chunks_.insert(chunks_.end(), ids.begin(), ids.end());
  state_ = failure.ok() ? TensorState::kMapped : TensorState::kBroken;
  return failure;
}

Status VirtualTensor::map_shared(const std::vector<ChunkId>& ids) {
  if (Status s = pool_->retain(ids); !s.ok()) return s;
  return extend(ids);
}

Retired VirtualTensor::retire() {
  if (std::exchange(kind_, Reference::kIdle) == Reference::kIdle) return {0, 0};
  return pool_->retire(chunks_);
}

void VirtualTensor::revive() {
  if (std::exchange(kind_, Reference::kLive) == Reference::kIdle) pool_->revive(chunks_);
}

Status VirtualTensor::unmap_tail(size_t n_chunks) {
  if (n_chunks < chunks_.size()) {
    const size_t chunk_bytes = pool_->chunk_bytes();
    Status s = Status::Ok();
    {
      CallTimer timer(&stats_->unmap_calls, &stats_->unmap_ns);
      s = pool_->driver().unmap(base_ + n_chunks * chunk_bytes,
                                (chunks_.size() - n_chunks) * chunk_bytes);
    }
    if (!s.ok()) {
      state_ = TensorState::kBroken;
      return Status(Code::kBroken, s.message());
    }
    const std::vector<ChunkId> unmapped(chunks_.begin() + n_chunks, chunks_.end());
    chunks_.resize(n_chunks);
    return pool_->release(unmapped, kind_);
  }
  return Status::Ok();
}

Status VirtualTensor::truncate(size_t n_chunks) {
  if (state_ != TensorState::kReserved && state_ != TensorState::kMapped) {
    return wrong_state("truncate", state_);
  }
  Status s = unmap_tail(n_chunks);
  if (state_ != TensorState::kBroken && chunks_.empty()) state_ = TensorState::kReserved;
  return s;
}

Status VirtualTensor::repair() {
  if (state_ != TensorState::kBroken) return wrong_state("repair", state_);
  Status s = unmap_tail(0);
  if (chunks_.empty()) state_ = TensorState::kReserved;
  return s;
}

Status VirtualTensor::release() {
  if (state_ == TensorState::kReleased) return Status::Ok();
  Status s = unmap_tail(0);
  if (chunks_.empty()) state_ = TensorState::kReleased;
  return s;
}

void VirtualTensor::abandon() {
  chunks_.clear();
  state_ = TensorState::kReleased;
}

}  // namespace ellm
