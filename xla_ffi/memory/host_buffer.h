// The host tier's memory: blocks of one size under a limit, counted to the byte.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "memory/driver.h"
#include "memory/status.h"
#include "memory/turns.h"

namespace ellm {

using BlockId = uint32_t;

// One consistent picture, in bytes. used + free == limit.
struct HostUsage {
  size_t limit;
  size_t used;  // Blocks that were taken.
  size_t free;
  size_t peak_used;
  size_t physical;  // Taken from the system: used, and blocks kept for the next take. <= limit.
};

// Thread-safe. A block gets its memory when it is first taken, so that a lack of it is an error
// there, and keeps it when it is given back. Calls that need the driver (take, resize, trim) wait
// for each other, and for one block at most where memory is being prepared; the others never wait
// for the driver.
class HostBuffer {
 public:
  // `limit_bytes` need not be a multiple of `block_bytes`, which is whole pages. Errors: kInvalid,
  // kDriver (no addresses).
  static Result<std::shared_ptr<HostBuffer>> Create(std::shared_ptr<Driver> driver,
                                                    size_t block_bytes, size_t limit_bytes);
  // As close(). What cannot be unmapped even now is leaked: addresses and memory.
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  // Appends `n` blocks to `out`; all or nothing. Their contents are undefined. Errors:
  // kOutOfMemory, kDriver, kBroken: nobody's blocks change, but some may be backed by then.
  Status take(size_t n, std::vector<BlockId>* out);
  // Makes memory for blocks until as many as `bytes` (or the limit) hold have some, so that take()
  // need not. Block by block: between two of them whoever waits goes first. Errors: kDriver,
  // kBroken.
  Status prepare(size_t bytes);
  // The same on a thread of the buffer's own, until it is done, something fails (take() will say
  // what, if it lasts), or trim() gives memory back. It replaces what was asked before; 0 ends it.
  // Errors: kDriver (no thread).
  Status prepare_ahead(size_t bytes);
  // As prepare_ahead(0): the thread has ended, after the block that it was at. Blocks stay.
  void close() { (void)prepare_ahead(0); }
  // Errors: kInvalid, and nothing changes, where a block is nobody's, named twice, or pinned.
  // Abandoned blocks are accepted, but stay used.
  Status give_back(const std::vector<BlockId>& blocks);

  // The addresses of taken blocks, which cannot be given back until unpin() was called as often as
  // pin(). Errors: kInvalid where a block is nobody's.
  Result<std::vector<std::byte*>> pin(const std::vector<BlockId>& blocks);
  // `blocks` are pinned.
  void unpin(const std::vector<BlockId>& blocks);
  // Instead of unpin(), where nobody can say whether a device still copies from or to them: they
  // are lost, and so is their memory until the process ends.
  void abandon(const std::vector<BlockId>& blocks);

  // Errors: kOutOfMemory below what is used, kDriver, kBroken; the old limit stays.
  Status resize(size_t limit_bytes);
  // Gives the memory of blocks that nobody has back to the system. Returns the bytes. Errors:
  // kDriver, kBroken; it goes on after an error, and what did not go may be taken or trimmed again.
  Result<size_t> trim();

  HostUsage usage() const;
  size_t block_bytes() const { return block_bytes_; }

 private:
  enum State : uint8_t {
    kVacant,    // No memory.
    kDetached,  // Memory that is not mapped: a driver call has failed.
    kDoubtful,  // Memory that may or may not be mapped: an unmap has failed.
    kIdle,      // Mapped and nobody's.
    kTaken,
  };
  struct Block {
    std::byte* at;
    Handle handle = 0;
    State state = kVacant;
    bool abandoned = false;  // And taken, for ever.
    uint32_t pins = 0;
  };
  struct Range {
    std::byte* base;
    size_t bytes;
  };

  HostBuffer(std::shared_ptr<Driver> driver, size_t block_bytes)
      : driver_(std::move(driver)), block_bytes_(block_bytes) {}

  // One block of prepare(bytes), or of its thread's; false where there is nothing left to do.
  Result<bool> prepare_one(size_t bytes, bool ahead);

  // With the turn, and without mutex_.
  Status reserve_for(size_t limit_bytes);
  Status back_one();                      // One more idle block.
  Status drop(BlockId id);                // Its memory goes to the system.
  Status unmap(BlockId id, State after);  // kDoubtful if it fails.
  void move(BlockId id, State state);

  // With mutex_ held.
  void move_locked(BlockId id, State state);
  Status check_taken(const std::vector<BlockId>& blocks, const char* verb) const;
  size_t used() const { return in_[kTaken].size() * block_bytes_; }
  size_t physical() const { return (blocks_.size() - in_[kVacant].size()) * block_bytes_; }

  const std::shared_ptr<Driver> driver_;
  const size_t block_bytes_;
  Turns turns_;  // Of driver work; taken before mutex_.
  std::vector<Range> ranges_;

  mutable std::mutex mutex_;  // Guards all below; not held across driver calls.
  size_t limit_ = 0;
  size_t peak_used_ = 0;
  std::vector<Block> blocks_;
  std::array<std::set<BlockId>, kTaken + 1> in_;  // By state: the lowest are taken first.

  std::mutex preparer_mutex_;  // Guards the thread's start and end.
  std::atomic<bool> stopping_{false};
  std::thread preparer_;  // Last: it uses what stands above.
};

}  // namespace ellm
