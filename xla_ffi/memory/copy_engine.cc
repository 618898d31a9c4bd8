#include "memory/copy_engine.h"

#include <chrono>
#include <string>
#include <utility>

#include "memory/stream_copy.h"

namespace ellm {

Copier::Copier() : thread_([this] { serve(); }) {}

Copier::~Copier() { close(); }

void Copier::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
  std::lock_guard<std::mutex> closing(close_mutex_);
  if (thread_.joinable()) thread_.join();
}

Result<Ticket> Copier::submit(CopyDirection direction, ChunkAddress chunk,
                              std::shared_ptr<HostBuffer> buffer, std::vector<BlockId> blocks) {
  auto addresses = buffer->pin(blocks);
  if (!addresses.ok()) return addresses.status();
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) {
    buffer->unpin(blocks);
    return Status(Code::kInvalid, "the copier is closed; make a new one");
  }
  queue_.push_back({direction, std::move(chunk), std::move(buffer), std::move(blocks),
                    std::move(addresses.value())});
  const Ticket ticket = ++last_ticket_;
  lock.unlock();
  changed_.notify_all();
  return ticket;
}

Status Copier::carry_out(const Copy& copy, size_t* copied_bytes) {
  const size_t bytes = copy.buffer->block_bytes();
  for (size_t i = 0; i < copy.addresses.size(); ++i) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_) {
        return Status(Code::kDriver, "the copier was closed after " + std::to_string(i) + " of " +
                                         std::to_string(copy.addresses.size()) +
                                         " chunks; wait for tickets before closing it");
      }
    }
    Result<std::byte*> chunk = copy.chunk(i);
    if (!chunk.ok()) return Status(Code::kDriver, chunk.status().message());
    if (copy.direction == CopyDirection::kOffload) {
      stream_copy(copy.addresses[i], chunk.value(), bytes);
    } else {
      stream_copy(chunk.value(), copy.addresses[i], bytes);
    }
    *copied_bytes += bytes;
  }
  return Status::Ok();
}

void Copier::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Copy copy = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();

    size_t bytes = 0;
    const auto start = std::chrono::steady_clock::now();
    Status s = carry_out(copy, &bytes);
    const auto spent = std::chrono::steady_clock::now() - start;
    copy.buffer->unpin(copy.blocks);
    const auto direction = static_cast<size_t>(copy.direction);
    copy = Copy{};  // Whoever waits finds nothing of it held any more.

    lock.lock();
    Direction& total = totals_[direction];
    total.bytes += bytes;
    total.ns +=
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count());
    ++last_done_;
    if (s.ok()) {
      ++total.calls;
    } else {
      failures_.emplace(last_done_, std::move(s));
    }
    changed_.notify_all();
  }
}

Status Copier::check(Ticket ticket) const {
  if (ticket > 0 && ticket <= last_ticket_) return Status::Ok();
  return Status(Code::kInvalid, "there is no ticket " + std::to_string(ticket) + "; the last is " +
                                    std::to_string(last_ticket_));
}

Result<bool> Copier::done(Ticket ticket) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (Status s = check(ticket); !s.ok()) return s;
  return ticket <= last_done_;
}

Status Copier::wait(Ticket ticket) const {
  std::unique_lock<std::mutex> lock(mutex_);
  if (Status s = check(ticket); !s.ok()) return s;
  changed_.wait(lock, [&] { return ticket <= last_done_; });
  const auto failure = failures_.find(ticket);
  return failure == failures_.end() ? Status::Ok() : failure->second;
}

CopyStats Copier::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto of = [this](CopyDirection direction) {
    const Direction& total = totals_[static_cast<size_t>(direction)];
    return CopyStats::Direction{total.bytes, total.ns / 1000, total.calls};
  };
  return {of(CopyDirection::kOffload), of(CopyDirection::kFetch)};
}

}  // namespace ellm
