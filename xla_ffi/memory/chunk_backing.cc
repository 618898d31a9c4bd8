// ChunkPool: the memory behind chunks, made when it is needed or ahead, kept, and given back.
#include <algorithm>
#include <chrono>
#include <iterator>

#include "memory/chunk_pool.h"

namespace ellm {
namespace {

uint64_t ns_since(std::chrono::steady_clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start)
          .count());
}

}  // namespace

uint32_t ChunkPool::add_chunk(Handle handle) {
  uint32_t index;
  if (vacant_.empty()) {
    index = static_cast<uint32_t>(chunks_.size());
    chunks_.emplace_back();
  } else {
    index = vacant_.back();
    vacant_.pop_back();
  }
  chunks_[index].handle = handle;
  return index;
}

std::vector<Handle> ChunkPool::take_backed_for_destruction(size_t n) {
  std::vector<Handle> handles;
  handles.reserve(n);
  while (handles.size() < n) {
    const BackedChunks::Backed last = backed_.take_last();
    handles.push_back(last.handle);
    chunks_[last.index].handle = 0;
    vacant_.push_back(last.index);
  }
  destroying_bytes_ += n * chunk_bytes_;
  backing_ = false;  // Or the thread would make again what has to go.
  return handles;
}

Status ChunkPool::create_handles(size_t n, bool large, std::vector<Handle>* out) {
  Status failure = Status::Ok();
  const auto start = std::chrono::steady_clock::now();
  const size_t before = out->size();
  uint64_t calls = 0;
  if (large) {
    out->resize(before + n);
    failure = driver_->create_large(chunk_bytes_, n, out->data() + before);
    if (!failure.ok()) out->resize(before);
    ++calls;
  }
  for (size_t i = 0; !large && i < n && failure.ok(); ++i) {
    Handle handle = 0;
    failure = driver_->create(chunk_bytes_, &handle);
    if (failure.ok()) out->push_back(handle);
    ++calls;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  create_calls_ += calls;
  create_ns_ += ns_since(start);
  return failure;
}

Status ChunkPool::destroy_handles(const std::vector<Handle>& handles, size_t* destroyed) {
  Status failure = Status::Ok();
  std::vector<Handle> kept;
  const auto start = std::chrono::steady_clock::now();
  for (const Handle handle : handles) {
    Status s = driver_->destroy(handle, chunk_bytes_);
    if (s.ok()) continue;
    kept.push_back(handle);
    if (failure.ok()) failure = Status(Code::kDriver, s.message());
  }
  *destroyed = (handles.size() - kept.size()) * chunk_bytes_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    destroy_calls_ += handles.size();
    destroy_ns_ += ns_since(start);
    destroying_bytes_ -= handles.size() * chunk_bytes_;
    for (const Handle handle : kept) backed_.add(handle, add_chunk(handle));
  }
  changed_.notify_all();
  return failure;
}

Result<size_t> ChunkPool::trim(size_t keep_backed_bytes) {
  std::vector<Handle> handles;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    backing_ = false;
    changed_.wait(lock, [this] { return making_bytes_ == 0; });
    const size_t keep = std::min(backed_.size(), keep_backed_bytes / chunk_bytes_);
    handles = take_backed_for_destruction(backed_.size() - keep);
  }
  size_t destroyed;
  if (Status s = destroy_handles(handles, &destroyed); !s.ok()) return s;
  return destroyed;
}

bool ChunkPool::may_back_one() const {
  return backed_.size() < chunks_ahead_ && limit_ - physical() >= chunk_bytes_;
}

void ChunkPool::back_ahead(size_t bytes) {
  std::lock_guard<std::mutex> starting(backer_mutex_);
  const bool wanted = bytes >= chunk_bytes_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    chunks_ahead_ = bytes / chunk_bytes_;
    backing_ = wanted;
    stopping_ = !wanted;
  }
  backing_wanted_.notify_one();
  if (wanted && !backer_.joinable()) {
    backer_ = std::thread([this] { back_on_demand(); });
  } else if (!wanted && backer_.joinable()) {
    backer_.join();
  }
}

void ChunkPool::back_on_demand() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    backing_wanted_.wait(lock, [this] { return stopping_ || backing_; });
    if (stopping_) return;
    if (!may_back_one()) {
      backing_ = false;
      continue;
    }
    making_bytes_ += chunk_bytes_;
    note_physical();
    lock.unlock();
    std::vector<Handle> made;
    const bool refused =
        !create_handles(1, false, &made).ok();  // acquire() will say why, if it lasts.
    lock.lock();
    making_bytes_ -= chunk_bytes_;
    for (const Handle handle : made) backed_.add(handle, add_chunk(handle));
    if (refused) backing_ = false;
    changed_.notify_all();
  }
}

}  // namespace ellm
