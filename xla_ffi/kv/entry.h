// What the files of KvCache share. For them only.
#pragma once

#include <string>

#include "kv/kv_cache.h"

namespace ellm {

inline Status of_slot(int64_t slot, const Status& s) {
  return Status(s.code(), "slot " + std::to_string(slot) + ": " + s.message());
}

// Lets one thread at a time past, and none past close().
class KvCache::Entry {
 public:
  explicit Entry(KvCache* cache) : cache_(cache), first_(!cache->busy_.exchange(true)) {}
  ~Entry() {
    if (first_) cache_->busy_.store(false);
  }
  Status status() const {
    if (!first_) {
      return Status(Code::kInvalid,
                    "two threads change the KV cache at once; use it from one thread");
    }
    return Status::Ok();
  }
  Status status_if_open() const {
    if (first_ && cache_->closed_) {
      return Status(Code::kInvalid, "the KV cache is closed; make a new one");
    }
    return status();
  }

 private:
  KvCache* cache_;
  bool first_;
};

}  // namespace ellm
