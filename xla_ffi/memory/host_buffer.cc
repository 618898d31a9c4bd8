#include "memory/host_buffer.h"

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

#include "memory/text.h"

namespace ellm {

Result<std::shared_ptr<HostBuffer>> HostBuffer::Create(std::shared_ptr<Driver> driver,
                                                       size_t block_bytes, size_t limit_bytes) {
  const size_t granularity = driver->granularity_bytes();
  if (block_bytes == 0 || block_bytes % granularity != 0) {
    return Status(Code::kInvalid, "block_bytes is " + std::to_string(block_bytes) +
                                      "; it must be a positive multiple of " +
                                      std::to_string(granularity));
  }
  std::shared_ptr<HostBuffer> buffer(new HostBuffer(std::move(driver), block_bytes));
  if (Status s = buffer->resize(limit_bytes); !s.ok()) return s;
  return buffer;
}

HostBuffer::~HostBuffer() {
  close();
  bool all_unmapped = true;
  for (BlockId id = 0; id < blocks_.size(); ++id) {
    if (blocks_[id].state == kVacant) continue;
    if (!blocks_[id].abandoned) (void)drop(id);
    all_unmapped &= blocks_[id].state == kVacant || blocks_[id].state == kDetached;
  }
  if (!all_unmapped) return;
  for (const Range& range : ranges_) (void)driver_->release(range.base, range.bytes);
}

void HostBuffer::move_locked(BlockId id, State state) {
  in_[blocks_[id].state].erase(id);
  in_[state].insert(id);
  blocks_[id].state = state;
}

void HostBuffer::move(BlockId id, State state) {
  std::lock_guard<std::mutex> lock(mutex_);
  move_locked(id, state);
}

Status HostBuffer::reserve_for(size_t limit_bytes) {
  const size_t wanted = limit_bytes / block_bytes_;
  if (wanted > UINT32_MAX) {
    return Status(Code::kInvalid, human_bytes(limit_bytes) + " are more than 2^32 blocks of " +
                                      human_bytes(block_bytes_) + "; lower the limit");
  }
  if (wanted <= blocks_.size()) return Status::Ok();
  const size_t more = wanted - blocks_.size();
  Range range{nullptr, more * block_bytes_};
  if (Status s = driver_->reserve(range.bytes, driver_->granularity_bytes(), &range.base);
      !s.ok()) {
    return s;
  }
  ranges_.push_back(range);
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < more; ++i) {
    in_[kVacant].insert(static_cast<BlockId>(blocks_.size()));
    blocks_.push_back({range.base + i * block_bytes_});
  }
  return Status::Ok();
}

Status HostBuffer::unmap(BlockId id, State after) {
  Status s = driver_->unmap(blocks_[id].at, block_bytes_);
  move(id, s.ok() ? after : kDoubtful);
  return s.ok() ? s : Status(Code::kBroken, s.message());
}

Status HostBuffer::back_one() {
  BlockId id;
  State state;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!in_[kDetached].empty()) {
      id = *in_[kDetached].begin();
    } else if (!in_[kVacant].empty() && block_bytes_ <= limit_ - physical()) {
      id = *in_[kVacant].begin();
    } else {
      // The caller's blocks are within the limit, so doubtful ones stand in their way.
      id = *in_[kDoubtful].begin();
    }
    state = blocks_[id].state;
    if (state == kVacant) move_locked(id, kDetached);  // Counted before it is taken.
  }
  Block& block = blocks_[id];
  if (state == kVacant) {
    if (Status s = driver_->create(block_bytes_, &block.handle); !s.ok()) {
      move(id, kVacant);
      return s;
    }
  } else if (state == kDoubtful) {
    if (Status s = unmap(id, kDetached); !s.ok()) return s;
  }
  Status s = driver_->map(block.at, &block.handle, 1, block_bytes_);
  if (s.ok()) {
    move(id, kIdle);
  } else if (s.code() == Code::kBroken) {
    move(id, kDoubtful);
  }
  return s;
}

Status HostBuffer::drop(BlockId id) {
  Block& block = blocks_[id];
  if (block.state != kDetached) {
    if (Status s = unmap(id, kDetached); !s.ok()) return s;
  }
  if (Status s = driver_->destroy(block.handle, block_bytes_); !s.ok()) return s;
  block.handle = 0;
  move(id, kVacant);
  return Status::Ok();
}

Status HostBuffer::take(size_t n, std::vector<BlockId>* out) {
  const Turns::Turn turn(turns_);
  for (;;) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (n > (limit_ - used()) / block_bytes_) {
        return Status(Code::kOutOfMemory,
                      std::to_string(n) + " host blocks of " + human_bytes(block_bytes_) +
                          " were asked for, but of the limit of " + human_bytes(limit_) + " only " +
                          human_bytes(limit_ - used()) +
                          " are free; give blocks back or raise the limit of host memory");
      }
      std::set<BlockId>& idle = in_[kIdle];
      if (idle.size() >= n) {
        for (size_t i = 0; i < n; ++i) {
          const BlockId id = *idle.begin();
          move_locked(id, kTaken);
          out->push_back(id);
        }
        peak_used_ = std::max(peak_used_, used());
        return Status::Ok();
      }
    }
    if (Status s = back_one(); !s.ok()) return s;
  }
}

Result<bool> HostBuffer::prepare_one(size_t bytes, bool ahead) {
  const Turns::Turn turn(turns_, Turns::For::kLater);
  if (ahead && stopping_) return false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t wanted = std::min(bytes, limit_) / block_bytes_;
    if (in_[kTaken].size() + in_[kIdle].size() >= wanted) return false;
  }
  if (Status s = back_one(); !s.ok()) return s;
  return true;
}

Status HostBuffer::prepare(size_t bytes) {
  for (;;) {
    const Result<bool> more = prepare_one(bytes, false);
    if (!more.ok() || !more.value()) return more.status();
  }
}

Status HostBuffer::prepare_ahead(size_t bytes) {
  std::lock_guard<std::mutex> starting(preparer_mutex_);
  stopping_ = true;
  if (preparer_.joinable()) preparer_.join();
  if (bytes < block_bytes_) return Status::Ok();
  stopping_ = false;
  try {
    preparer_ = std::thread([this, bytes] {
      for (;;) {
        const Result<bool> more = prepare_one(bytes, true);
        if (!more.ok() || !more.value()) return;
      }
    });
  } catch (const std::system_error& error) {
    return Status(Code::kDriver, std::string("host memory cannot be prepared ahead: ") +
                                     error.what() + "; end what else uses threads");
  }
  return Status::Ok();
}

Status HostBuffer::check_taken(const std::vector<BlockId>& blocks, const char* verb) const {
  for (const BlockId id : blocks) {
    if (id < blocks_.size() && blocks_[id].state == kTaken) continue;
    return Status(Code::kInvalid, "cannot " + std::string(verb) + " host block " +
                                      std::to_string(id) + ": nobody has taken it");
  }
  return Status::Ok();
}

Status HostBuffer::give_back(const std::vector<BlockId>& blocks) {
  std::vector<BlockId> sorted = blocks;
  std::sort(sorted.begin(), sorted.end());
  if (const auto twin = std::adjacent_find(sorted.begin(), sorted.end()); twin != sorted.end()) {
    return Status(Code::kInvalid, "host block " + std::to_string(*twin) +
                                      " is to be given back twice; name each block once");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (Status s = check_taken(blocks, "give back"); !s.ok()) return s;
  for (const BlockId id : blocks) {
    if (blocks_[id].pins == 0 || blocks_[id].abandoned) continue;
    return Status(Code::kInvalid, "cannot give back host block " + std::to_string(id) +
                                      ": a copy from or to it is under way; wait for its ticket");
  }
  for (const BlockId id : blocks) {
    if (!blocks_[id].abandoned) move_locked(id, kIdle);
  }
  return Status::Ok();
}

Result<std::vector<std::byte*>> HostBuffer::pin(const std::vector<BlockId>& blocks) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (Status s = check_taken(blocks, "copy from or to"); !s.ok()) return s;
  std::vector<std::byte*> addresses;
  addresses.reserve(blocks.size());
  for (const BlockId id : blocks) {
    ++blocks_[id].pins;
    addresses.push_back(blocks_[id].at);
  }
  return addresses;
}

void HostBuffer::unpin(const std::vector<BlockId>& blocks) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const BlockId id : blocks) --blocks_[id].pins;
}

void HostBuffer::abandon(const std::vector<BlockId>& blocks) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const BlockId id : blocks) blocks_[id].abandoned = true;
}

Status HostBuffer::resize(size_t limit_bytes) {
  const Turns::Turn turn(turns_);
  for (;;) {
    BlockId id = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (limit_bytes < used()) {
        return Status(Code::kOutOfMemory, "a host memory limit of " + human_bytes(limit_bytes) +
                                              " was asked for, but " + human_bytes(used()) +
                                              " are in use; give blocks back first");
      }
      if (physical() <= limit_bytes) break;
      // More than `used` is physical: there is a block to drop.
      for (const State state : {kDetached, kIdle, kDoubtful}) {
        if (in_[state].empty()) continue;
        id = *in_[state].rbegin();
        break;
      }
    }
    if (Status s = drop(id); !s.ok()) return s;
  }
  if (Status s = reserve_for(limit_bytes); !s.ok()) return s;
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = limit_bytes;
  return Status::Ok();
}

Result<size_t> HostBuffer::trim() {
  stopping_ = true;  // Or the thread would make again what has to go.
  const Turns::Turn turn(turns_);
  std::vector<BlockId> unused;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const State state : {kDetached, kDoubtful, kIdle}) {
      unused.insert(unused.end(), in_[state].begin(), in_[state].end());
    }
  }
  size_t given = 0;
  Status first = Status::Ok();
  for (const BlockId id : unused) {
    Status s = drop(id);
    if (s.ok()) {
      given += block_bytes_;
    } else if (first.ok()) {
      first = std::move(s);
    }
  }
  if (!first.ok()) return first;
  return given;
}

HostUsage HostBuffer::usage() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {limit_, used(), limit_ - used(), peak_used_, physical()};
}

}  // namespace ellm
