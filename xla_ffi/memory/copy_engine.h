// Copies between mapped chunks and host blocks on a thread of its own.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "memory/host_buffer.h"
#include "memory/status.h"

namespace ellm {

enum class CopyDirection : uint8_t { kOffload, kFetch };  // Chunks to blocks, blocks to chunks.

// The address of the i-th chunk of a copy, of block_bytes() bytes, or why there is none (any more).
// Called on the copier's thread just before that chunk is touched.
using ChunkAddress = std::function<Result<std::byte*>(size_t i)>;

// Counts from 1 in the order of submission.
using Ticket = uint64_t;

struct CopyStats {
  struct Direction {
    uint64_t bytes, us, calls;  // What was copied, the time in it, and copies that were finished.
  };
  Direction offload, fetch;
};

// Thread-safe. Copies are done one after the other, in the order of submission. Until a copy is
// done its blocks stay pinned and the caller keeps its chunks mapped, and unchanged (offload) or
// untouched (fetch).
class Copier {
 public:
  Copier();
  ~Copier();  // As close().
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Copies between chunk i and blocks[i] for all i. Errors: kInvalid (closed, or a block is
  // nobody's); what goes wrong later is told by wait().
  Result<Ticket> submit(CopyDirection direction, ChunkAddress chunk,
                        std::shared_ptr<HostBuffer> buffer, std::vector<BlockId> blocks);

  // Whether the copy is over, well or not. Errors: kInvalid for a ticket that was not given out.
  Result<bool> done(Ticket ticket) const;
  // Waits until it is. Errors: kInvalid as above; kDriver where a chunk had no address, or the
  // copier was closed first: some of the chunks or blocks may have been copied.
  Status wait(Ticket ticket) const;

  CopyStats stats() const;

  // What is under way ends after the current chunk, what waits is not begun: both have failed.
  // Returns when the thread has ended; may be repeated.
  void close();

 private:
  struct Copy {
    CopyDirection direction;
    ChunkAddress chunk;
    std::shared_ptr<HostBuffer> buffer;
    std::vector<BlockId> blocks;
    std::vector<std::byte*> addresses;
  };

  void serve();
  Status carry_out(const Copy& copy, size_t* copied_bytes);
  Status check(Ticket ticket) const;  // With the lock held.

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::deque<Copy> queue_;
  Ticket last_ticket_ = 0;
  Ticket last_done_ = 0;
  std::map<Ticket, Status> failures_;
  struct Direction {
    uint64_t bytes = 0, ns = 0, calls = 0;
  };
  std::array<Direction, 2> totals_;
  bool closed_ = false;
  std::mutex close_mutex_;  // Two threads may close at once.
  std::thread thread_;      // Last: it uses what stands above.
};

}  // namespace ellm
