// The pieces of memory that a driver has mapped, each of which can only go as a whole.
#pragma once

#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "memory/driver.h"

namespace ellm {

struct Piece {
  std::byte* at;
  size_t bytes;
};

// Thread-safe; nobody calls a driver with its lock held.
class PieceTable {
 public:
  // Nothing was mapped there.
  void add(Piece piece) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_at_[piece.at] = piece.bytes;
  }
  void remove(const std::vector<Piece>& pieces) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Piece& piece : pieces) bytes_at_.erase(piece.at);
  }

  std::vector<Piece> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return between(bytes_at_.begin(), bytes_at_.end());
  }
  // The pieces in [at, at + bytes), in order. Errors: kInvalid where one is partly outside.
  Result<std::vector<Piece>> inside(std::byte* at, size_t bytes) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto first = bytes_at_.lower_bound(at);
    const auto last = bytes_at_.lower_bound(at + bytes);
    if ((first != bytes_at_.begin() && end_of(std::prev(first)) > at) ||
        (last != bytes_at_.begin() && end_of(std::prev(last)) > at + bytes)) {
      return Status(Code::kInvalid,
                    "a range to unmap ends inside of a chunk; unmap whole chunks, as they were "
                    "mapped");
    }
    return between(first, last);
  }

 private:
  using Iterator = std::map<std::byte*, size_t>::const_iterator;

  static std::byte* end_of(Iterator piece) { return piece->first + piece->second; }
  static std::vector<Piece> between(Iterator first, Iterator last) {
    std::vector<Piece> pieces;
    for (; first != last; ++first) pieces.push_back({first->first, first->second});
    return pieces;
  }

  mutable std::mutex mutex_;
  std::map<std::byte*, size_t> bytes_at_;
};

}  // namespace ellm
