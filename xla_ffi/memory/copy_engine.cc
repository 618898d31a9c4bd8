#include "memory/copy_engine.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace ellm {
namespace {

bool intersect(const std::vector<BlockId>& a, const std::vector<BlockId>& b) {
  auto i = a.begin(), j = b.begin();
  while (i != a.end() && j != b.end() && *i != *j) ++(*i < *j ? i : j);
  return i != a.end() && j != b.end();
}

}  // namespace

Copier::Copier(std::unique_ptr<CopyLink> link) : link_(std::move(link)) {
  const size_t lanes = link_->duplex() ? 2 : 1;
  try {
    for (size_t i = 0; i < lanes; ++i) {
      lanes_[i].thread = std::thread([this, i] { serve(&lanes_[i]); });
    }
  } catch (...) {
    close();  // The first thread must not outlive what it works with.
    throw;
  }
}

Copier::~Copier() { close(); }

void Copier::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
  std::lock_guard<std::mutex> closing(close_mutex_);
  for (Lane& lane : lanes_) {
    if (lane.thread.joinable()) lane.thread.join();
  }
}

Ticket Copier::last_conflict(const Open& with) const {
  for (auto it = open_.rbegin(); it != open_.rend(); ++it) {
    const Open& other = it->second;
    if (other.lane != with.lane && other.buffer == with.buffer &&
        intersect(other.blocks, with.blocks)) {
      return it->first;
    }
  }
  return 0;
}

Result<Ticket> Copier::submit(CopyDirection direction, ChunkAddress chunk,
                              std::shared_ptr<HostBuffer> buffer, std::vector<BlockId> blocks) {
  auto addresses = buffer->pin(blocks);
  if (!addresses.ok()) return addresses.status();
  Open open{link_->duplex() ? static_cast<size_t>(direction) : 0, buffer.get(), blocks};
  std::sort(open.blocks.begin(), open.blocks.end());
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) {
    buffer->unpin(blocks);
    return Status(Code::kInvalid, "the copier is closed; make a new one");
  }
  const Ticket ticket = ++last_ticket_;
  lanes_[open.lane].queue.push_back({ticket, last_conflict(open), direction, std::move(chunk),
                                     std::move(buffer), std::move(blocks),
                                     std::move(addresses.value())});
  open_.emplace(ticket, std::move(open));
  lock.unlock();
  changed_.notify_all();
  return ticket;
}

Status Copier::begin_all(const Copy& copy, size_t* begun) {
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
    Status s =
        link_->begin(copy.direction, chunk.value(), copy.addresses[i], copy.buffer->block_bytes());
    if (!s.ok()) return s;
    ++*begun;
  }
  return Status::Ok();
}

Status Copier::carry_out(const Copy& copy, size_t* copied_bytes) {
  size_t begun = 0;
  Status s = begin_all(copy, &begun);
  Status over = link_->finish(copy.direction);
  if (over.ok()) *copied_bytes = begun * copy.buffer->block_bytes();
  if (over.code() == Code::kBroken) {
    copy.buffer->abandon(copy.blocks);
    return Status(Code::kDriver, over.message());
  }
  copy.buffer->unpin(copy.blocks);
  return s.ok() ? over : Status(Code::kDriver, s.message());
}

void Copier::serve(Lane* lane) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return closed_ || !lane->queue.empty(); });
    if (lane->queue.empty()) return;
    Copy copy = std::move(lane->queue.front());
    lane->queue.pop_front();
    changed_.wait(lock, [&] { return !is_open(copy.after); });
    lock.unlock();

    size_t bytes = 0;
    const auto start = std::chrono::steady_clock::now();
    Status s = carry_out(copy, &bytes);
    const auto spent = std::chrono::steady_clock::now() - start;
    const Ticket ticket = copy.ticket;
    const auto direction = static_cast<size_t>(copy.direction);
    copy = Copy{};  // Whoever waits finds nothing of it held any more.

    lock.lock();
    Direction& total = totals_[direction];
    total.bytes += bytes;
    total.ns +=
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count());
    open_.erase(ticket);
    if (s.ok()) {
      ++total.calls;
    } else {
      failures_.emplace(ticket, std::move(s));
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
  return !is_open(ticket);
}

Status Copier::wait(Ticket ticket) const {
  std::unique_lock<std::mutex> lock(mutex_);
  if (Status s = check(ticket); !s.ok()) return s;
  changed_.wait(lock, [&] { return !is_open(ticket); });
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
