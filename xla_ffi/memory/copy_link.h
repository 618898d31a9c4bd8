// How bytes get from a chunk to a block of host memory, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory/status.h"

namespace ellm {

enum class CopyDirection : uint8_t { kOffload, kFetch };  // Chunks to blocks, blocks to chunks.

// Calls for the two directions may come from two threads, those for one direction from one.
class CopyLink {
 public:
  virtual ~CopyLink() = default;

  // Whether copies of both directions get on with each other at once.
  virtual bool duplex() const = 0;
  // Copies `bytes` between a chunk and a block, or begins to; may wait for what was begun before.
  // Errors: kDriver: it was not begun, or is over; kBroken: nobody knows, and finish() is to tell.
  virtual Status begin(CopyDirection direction, std::byte* chunk, std::byte* block,
                       size_t bytes) = 0;
  // Waits until everything that was begun in this direction is over, well or not. Errors: kDriver,
  // where some of it may have failed; kBroken, where some of it may still be under way.
  virtual Status finish(CopyDirection direction) = 0;
};

// Chunks that the host reaches, copied by the calling thread past its caches. Ends are 64-byte
// aligned, sizes multiples of 64.
std::unique_ptr<CopyLink> host_link();

}  // namespace ellm
