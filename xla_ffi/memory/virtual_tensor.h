// A segment of reserved addresses with chunks mapped from its start.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/chunk_pool.h"
#include "memory/status.h"

namespace ellm {

enum class TensorState : uint8_t {
  kReserved,  // Nothing is mapped.
  kMapped,    // The first chunks().size() chunks of the segment are mapped.
  kBroken,    // An unmap failed: chunks() may or may not be mapped. Only repair and release help.
  kReleased,  // The segment is given up; final.
};
const char* tensor_state_name(TensorState state);

// Driver calls and the time in them; may be shared by tensors and read by any thread.
struct MapStats {
  std::atomic<uint64_t> map_calls{0}, map_ns{0}, unmap_calls{0}, unmap_ns{0};
};

// Not thread-safe. Owns a reference to every chunk mapped in it, but not the address range, which
// several tensors may share. The pool and the stats outlive it.
class VirtualTensor {
 public:
  // Segment of `capacity_chunks` chunks from `base`, all of it reserved and unmapped.
  VirtualTensor(ChunkPool* pool, MapStats* stats, std::byte* base, size_t capacity_chunks);
  ~VirtualTensor();
  VirtualTensor(VirtualTensor&& other) noexcept;
  VirtualTensor& operator=(VirtualTensor&&) = delete;
  VirtualTensor(const VirtualTensor&) = delete;
  VirtualTensor& operator=(const VirtualTensor&) = delete;

  // Maps chunks after those mapped, which are not idle. Takes over the caller's reference to each
  // of `ids` whatever the outcome: on failure they are released, or kept for as long as they may be
  // mapped (kBroken). Errors: kInvalid (state, capacity, unknown id), kDriver, kBroken.
  Status extend(const std::vector<ChunkId>& ids);
  // The same with references of its own; the caller keeps its.
  Status map_shared(const std::vector<ChunkId>& ids);
  // Unmaps all but the first `n_chunks` and releases what was unmapped; no-op if fewer are mapped.
  // Errors: kInvalid (state), kBroken (all chunks are kept).
  Status truncate(size_t n_chunks);
  // Its references become idle, for a tensor that nobody uses although it stays mapped; and live
  // again. No-op if they are.
  Retired retire();
  void revive();
  // kBroken -> kReserved: unmaps again whatever may be mapped. Errors: kInvalid (state), kBroken.
  Status repair();
  // Unmaps everything, whatever the state. On success the tensor is kReleased; if the unmap fails
  // it is kBroken and release may be tried again. No-op when released.
  Status release();
  // Gives the segment up with everything left mapped, and its chunks lost: for memory that may be
  // touched for as long as anybody knows.
  void abandon();

  TensorState state() const { return state_; }
  std::byte* base() const { return base_; }
  std::byte* address_of(size_t chunk) const { return base_ + chunk * pool_->chunk_bytes(); }
  size_t capacity_chunks() const { return capacity_chunks_; }
  const std::vector<ChunkId>& chunks() const { return chunks_; }

 private:
  Status unmap_tail(size_t n_chunks);

  ChunkPool* pool_;
  MapStats* stats_;
  std::byte* base_;
  size_t capacity_chunks_;
  std::vector<ChunkId> chunks_;
  TensorState state_ = TensorState::kReserved;
  Reference kind_ = Reference::kLive;  // Of its references.
};

}  // namespace ellm
