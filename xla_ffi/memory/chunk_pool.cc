#include "memory/chunk_pool.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "memory/text.h"

namespace ellm {
namespace {

constexpr const char* kOwnerNames[kOwnerCount] = {"kv",      "cache",     "activation",
                                                  "weights", "workspace", "available"};

// Large pages are made so many at a time or not at all: each time the system first waits for every
// processor, milliseconds where they are busy, and the gain of fewer is less.
constexpr size_t kFewestLargePages = 4;

size_t at(Owner owner) { return static_cast<size_t>(owner); }

size_t large_chunks(const Driver& driver, size_t chunk_bytes) {
  const size_t large_bytes = driver.large_bytes();
  return large_bytes == 0 ? 0 : std::max<size_t>(1, large_bytes / chunk_bytes);
}

bool owns_chunks(Owner owner) {
  return owner == Owner::kKv || owner == Owner::kCache || owner == Owner::kActivation ||
         owner == Owner::kWorkspace;
}

}  // namespace

const char* owner_name(Owner owner) { return kOwnerNames[at(owner)]; }

Result<Owner> owner_from_name(std::string_view name) {
  for (size_t i = 0; i < kOwnerCount; ++i) {
    if (name == kOwnerNames[i]) return static_cast<Owner>(i);
  }
  return Status(Code::kInvalid, "there is no owner \"" + std::string(name) +
                                    "\"; use kv, cache, activation, weights or workspace");
}

Result<std::shared_ptr<ChunkPool>> ChunkPool::Create(std::shared_ptr<Driver> driver,
                                                     size_t chunk_bytes, size_t limit_bytes) {
  const size_t granularity = driver->granularity_bytes();
  if (chunk_bytes == 0 || chunk_bytes % granularity != 0 ||
      (chunk_bytes & (chunk_bytes - 1)) != 0) {
    return Status(Code::kInvalid, "chunk_bytes is " + std::to_string(chunk_bytes) +
                                      "; it must be a power of two and a multiple of " +
                                      std::to_string(granularity));
  }
  return std::shared_ptr<ChunkPool>(new ChunkPool(std::move(driver), chunk_bytes, limit_bytes));
}

ChunkPool::ChunkPool(std::shared_ptr<Driver> driver, size_t chunk_bytes, size_t limit_bytes)
    : driver_(std::move(driver)),
      chunk_bytes_(chunk_bytes),
      large_chunks_(large_chunks(*driver_, chunk_bytes)),
      limit_(limit_bytes),
      backed_(chunk_bytes, std::max<size_t>(1, large_chunks_)) {}

ChunkPool::~ChunkPool() {
  back_ahead(0);
  (void)trim(0);
}

ChunkId ChunkPool::own(uint32_t index, Owner owner) {
  Chunk& chunk = chunks_[index];
  chunk.live = 1;
  chunk.acquired_for = chunk.owner = owner;
  ++chunk.generation;
  return ChunkId{chunk.generation} << 32 | index;
}

size_t ChunkPool::claimed() const {
  return std::accumulate(owned_.begin(), owned_.end(), size_t{0});
}

size_t ChunkPool::physical() const {
  return claimed() + backed_.size() * chunk_bytes_ + destroying_bytes_ + making_bytes_;
}

void ChunkPool::add(Owner owner, size_t bytes) {
  size_t& owned = owned_[at(owner)];
  owned += bytes;
  peak_[at(owner)] = std::max(peak_[at(owner)], owned);
  peak_used_ = std::max(peak_used_, claimed() - owned_[at(Owner::kAvailable)]);
}

void ChunkPool::subtract(Owner owner, size_t bytes) { owned_[at(owner)] -= bytes; }

void ChunkPool::note_physical() { peak_physical_ = std::max(peak_physical_, physical()); }

Status ChunkPool::out_of_memory(const std::string& asked) const {
  std::string owners;
  for (size_t i = 0; i < kOwnerCount; ++i) {
    if (owned_[i] == 0) continue;
    owners +=
        std::string(owners.empty() ? "" : ", ") + kOwnerNames[i] + " " + human_bytes(owned_[i]);
  }
  std::string message = asked + ", but of the limit of " + human_bytes(limit_) + " only " +
                        human_bytes(limit_ - claimed()) + " can be had now (" +
                        (owners.empty() ? "nothing is in use" : owners) + "); ";
  message += owned_[at(Owner::kAvailable)] > 0
                 ? "unmap available slots, finish requests, or raise the limit"
                 : "finish requests or raise the limit";
  return Status(Code::kOutOfMemory, std::move(message));
}

Claim ChunkPool::take(Owner owner, size_t n, const std::vector<Destination>& where) {
  Claim claim{owner, std::vector<uint32_t>(n, Claim::kUnmade), {}};
  std::vector<uint32_t>& chunks = claim.chunks;
  if (large_chunks_ > 0) {
    size_t first = 0;
    for (const Destination& d : where) {
      const size_t past = reinterpret_cast<uintptr_t>(d.at) / chunk_bytes_ % large_chunks_;
      size_t begin = past == 0 ? 0 : large_chunks_ - past;
      for (; begin + large_chunks_ <= std::min(d.chunks, n - first); begin += large_chunks_) {
        if (!backed_.take_group(&chunks[first + begin])) claim.large.push_back(first + begin);
      }
      first += std::min(d.chunks, n - first);
    }
  }
  if (claim.large.size() < kFewestLargePages) claim.large.clear();
  // What is backed is used up before anything is made; what would fill a large page waits longest.
  const auto take_backed = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end && !backed_.empty(); ++i) {
      if (chunks[i] == Claim::kUnmade) chunks[i] = backed_.take();
    }
  };
  size_t done = 0;
  for (const size_t large : claim.large) {
    take_backed(done, large);
    done = large + large_chunks_;
  }
  take_backed(done, n);
  while (!claim.large.empty() && !backed_.empty()) {
    take_backed(claim.large.back(), claim.large.back() + large_chunks_);
    claim.large.pop_back();
  }
  if (claim.large.size() < kFewestLargePages) claim.large.clear();
  add(owner, n * chunk_bytes_);
  note_physical();
  if (n > 0 && backed_.size() < chunks_ahead_) {
    backing_ = true;
    backing_wanted_.notify_one();
  }
  return claim;
}

Status ChunkPool::acquire(Owner owner, size_t n, std::vector<ChunkId>* out,
                          const std::vector<Destination>& where) {
  if (!owns_chunks(owner)) {
    return Status(Code::kInvalid, std::string("chunks cannot be acquired for ") +
                                      owner_name(owner) +
                                      "; use kv, cache, activation or workspace");
  }
  Claim claim;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (n > (limit_ - claimed()) / chunk_bytes_) {
        if (expected_returns_ == 0) {
          return out_of_memory(std::to_string(n) + " chunks of " + human_bytes(chunk_bytes_) +
                               " were asked for " + owner_name(owner));
        }
      } else if ((n - std::min(n, backed_.size())) * chunk_bytes_ <= limit_ - physical()) {
        break;
      }
      changed_.wait(lock);  // What the ledger has free may be in the middle of being destroyed.
    }
    claim = take(owner, n, where);
  }
  return fill(std::move(claim), out);
}

Claim ChunkPool::claim_up_to(Owner owner, Destination where) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t at_once = backed_.size() + (limit_ - physical()) / chunk_bytes_;
  return take(owner, std::min({where.chunks, at_once, (limit_ - claimed()) / chunk_bytes_}),
              {where});
}

Status ChunkPool::fill(Claim claim, std::vector<ChunkId>* out) {
  std::vector<uint32_t>& chunks = claim.chunks;
  const auto unmade = static_cast<size_t>(std::count(chunks.begin(), chunks.end(), Claim::kUnmade));
  const size_t in_large = claim.large.size() * large_chunks_;
  // Large pages first, all in one call; then the others.
  std::vector<Handle> created;
  Status failure = Status::Ok();
  if (in_large > 0) failure = create_handles(in_large, true, &created);
  if (failure.ok()) failure = create_handles(unmade - in_large, false, &created);
  if (!failure.ok()) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      subtract(claim.owner, chunks.size() * chunk_bytes_);
      for (const uint32_t index : chunks) {
        if (index != Claim::kUnmade) backed_.add(chunks_[index].handle, index);
      }
      destroying_bytes_ += created.size() * chunk_bytes_;
    }
    size_t destroyed;
    (void)destroy_handles(created, &destroyed);  // The failure to create is the one to report.
    return failure;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto handle = created.begin();
  for (const size_t first : claim.large) {
    for (size_t i = 0; i < large_chunks_; ++i) chunks[first + i] = add_chunk(*handle++);
  }
  for (uint32_t& index : chunks) {
    if (index == Claim::kUnmade) index = add_chunk(*handle++);
    out->push_back(own(index, claim.owner));
  }
  return Status::Ok();
}

void ChunkPool::expect_return() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++expected_returns_;
}

void ChunkPool::return_settled() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    --expected_returns_;
  }
  changed_.notify_all();
}

Status ChunkPool::reserve_bytes(Owner owner, size_t bytes) {
  if (owner == Owner::kAvailable) {
    return Status(Code::kInvalid, "bytes cannot be reserved for available; use another owner");
  }
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (bytes > limit_ - claimed()) {
      if (expected_returns_ > 0) {
        changed_.wait(lock);
        continue;
      }
      return out_of_memory(human_bytes(bytes) + " were asked for " + owner_name(owner));
    }
    const size_t room = limit_ - physical();
    if (bytes <= room) {
      add(owner, bytes);
      plain_[at(owner)] += bytes;
      note_physical();
      return Status::Ok();
    }
    if (backed_.empty()) {
      changed_.wait(lock);
      continue;
    }
    const size_t needed = (bytes - room + chunk_bytes_ - 1) / chunk_bytes_;
    const std::vector<Handle> handles =
        take_backed_for_destruction(std::min(needed, backed_.size()));
    lock.unlock();
    size_t destroyed;
    if (Status s = destroy_handles(handles, &destroyed); !s.ok()) return s;
  }
}

Status ChunkPool::return_bytes(Owner owner, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > plain_[at(owner)]) {
    return Status(Code::kInvalid, human_bytes(bytes) + " cannot be returned by " +
                                      owner_name(owner) + ": it has reserved " +
                                      human_bytes(plain_[at(owner)]));
  }
  plain_[at(owner)] -= bytes;
  subtract(owner, bytes);
  return Status::Ok();
}

Status ChunkPool::set_limit(size_t limit_bytes) {
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (limit_bytes < claimed()) {
      if (expected_returns_ > 0) {
        changed_.wait(lock);
        continue;
      }
      return out_of_memory("a limit of " + human_bytes(limit_bytes) + " was asked for");
    }
    const size_t taken = physical();
    if (taken <= limit_bytes) {
      limit_ = limit_bytes;
      return Status::Ok();
    }
    if (backed_.empty()) {
      changed_.wait(lock);
      continue;
    }
    const size_t needed = (taken - limit_bytes + chunk_bytes_ - 1) / chunk_bytes_;
    const std::vector<Handle> handles =
        take_backed_for_destruction(std::min(needed, backed_.size()));
    lock.unlock();
    size_t destroyed;
    if (Status s = destroy_handles(handles, &destroyed); !s.ok()) return s;
  }
}

Usage ChunkPool::usage() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto owned = [this](Owner owner) { return owned_[at(owner)]; };
  const auto peak = [this](Owner owner) { return peak_[at(owner)]; };
  Usage u{};
  u.limit = limit_;
  u.kv = owned(Owner::kKv);
  u.cache = owned(Owner::kCache);
  u.activation = owned(Owner::kActivation);
  u.weights = owned(Owner::kWeights);
  u.workspace = owned(Owner::kWorkspace);
  u.available = owned(Owner::kAvailable);
  u.obtainable = limit_ - claimed();
  u.free = u.obtainable + u.available;
  u.backed_free = backed_.size() * chunk_bytes_;
  u.physical = physical();
  u.peak_kv = peak(Owner::kKv);
  u.peak_cache = peak(Owner::kCache);
  u.peak_activation = peak(Owner::kActivation);
  u.peak_weights = peak(Owner::kWeights);
  u.peak_workspace = peak(Owner::kWorkspace);
  u.peak_available = peak(Owner::kAvailable);
  u.peak_used = peak_used_;
  u.peak_physical = peak_physical_;
  u.create_calls = create_calls_;
  u.create_us = create_ns_ / 1000;
  u.destroy_calls = destroy_calls_;
  u.destroy_us = destroy_ns_ / 1000;
  return u;
}

void ChunkPool::reset_peaks() {
  std::lock_guard<std::mutex> lock(mutex_);
  peak_ = owned_;
  peak_used_ = claimed() - owned_[at(Owner::kAvailable)];
  peak_physical_ = physical();
}

}  // namespace ellm
