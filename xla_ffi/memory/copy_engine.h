// Copies between mapped chunks and host blocks on threads of its own.
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

#include "memory/copy_link.h"
#include "memory/host_buffer.h"
#include "memory/status.h"

namespace ellm {

// The address of the i-th chunk of a copy, of block_bytes() bytes, or why there is none (any more).
// Called on a thread of the copier just before that chunk is touched.
using ChunkAddress = std::function<Result<std::byte*>(size_t i)>;

// Counts from 1 in the order of submission.
using Ticket = uint64_t;

struct CopyStats {
  struct Direction {
    uint64_t bytes, us, calls;  // What was copied, the time in it, and copies that were finished.
  };
  Direction offload, fetch;
};

// Thread-safe. Copies are done one after the other, in the order of submission. Where the link is
// duplex each direction has a thread, and that holds for copies in one direction and for those that
// share a block; others may overtake. Until a copy is done its blocks stay pinned and the caller
// keeps its chunks mapped, and unchanged (offload) or untouched (fetch). Where even the device
// cannot tell whether a failed copy is over, its blocks are abandoned.
class Copier {
 public:
  // Throws std::system_error where the system has no threads left.
  explicit Copier(std::unique_ptr<CopyLink> link = host_link());
  ~Copier();  // As close().
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Copies between chunk i and blocks[i] for all i. Errors: kInvalid (closed, or a block is
  // nobody's); what goes wrong later is told by wait().
  Result<Ticket> submit(CopyDirection direction, ChunkAddress chunk,
                        std::shared_ptr<HostBuffer> buffer, std::vector<BlockId> blocks);

  // Whether the copy is over, well or not. Errors: kInvalid for a ticket that was not given out.
  Result<bool> done(Ticket ticket) const;
  // Waits until it is. Errors: kInvalid as above; kDriver where a chunk had no address, the device
  // failed, or the copier was closed first: some of the chunks or blocks may have been copied.
  Status wait(Ticket ticket) const;

  CopyStats stats() const;

  // What is under way ends after the chunks that were begun, what waits is not begun: both have
  // failed. Returns when the threads have ended; may be repeated.
  void close();

 private:
  struct Copy {
    Ticket ticket;
    Ticket after;  // Not to be begun before that one is over; 0: none.
    CopyDirection direction;
    ChunkAddress chunk;
    std::shared_ptr<HostBuffer> buffer;
    std::vector<BlockId> blocks;
    std::vector<std::byte*> addresses;
  };
  // A copy that is not over.
  struct Open {
    size_t lane;
    const HostBuffer* buffer;
    std::vector<BlockId> blocks;  // Sorted.
  };
  struct Lane {
    std::deque<Copy> queue;
    std::thread thread;
  };
  struct Direction {
    uint64_t bytes = 0, ns = 0, calls = 0;
  };

  void serve(Lane* lane);
  // Copies, and lets go of the blocks.
  Status carry_out(const Copy& copy, size_t* copied_bytes);
  // Begins to copy chunk after chunk; stops at the first that cannot be.
  Status begin_all(const Copy& copy, size_t* begun);
  // The functions below are called with the lock held.
  Status check(Ticket ticket) const;
  bool is_open(Ticket ticket) const { return open_.count(ticket) != 0; }
  // The last copy in another lane that has a block in common; 0: none.
  Ticket last_conflict(const Open& with) const;

  const std::unique_ptr<CopyLink> link_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Ticket last_ticket_ = 0;
  std::map<Ticket, Open> open_;
  std::map<Ticket, Status> failures_;
  std::array<Direction, 2> totals_;
  bool closed_ = false;
  std::mutex close_mutex_;     // Two threads may close at once.
  std::array<Lane, 2> lanes_;  // Last: their threads use what stands above. By direction.
};

}  // namespace ellm
