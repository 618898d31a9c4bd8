// Where a kernel call takes memory that lives as long as the call, such as partial results.
#pragma once

#include <cstddef>
#include <new>

namespace ellm {

// The caller of a kernel brings one; its functions may be called from any thread.
class WorkspaceSource {
 public:
  virtual ~WorkspaceSource() = default;
  // `bytes` > 0, 64-byte aligned, contents undefined; null where it is short.
  virtual void* allocate(size_t bytes) = 0;
  virtual void free(void* at) = 0;
};

// Memory from a source, or from the heap where there is none or it is short.
class WorkspaceMemory {
 public:
  WorkspaceMemory(WorkspaceSource* source, size_t bytes) {
    if (bytes == 0) return;
    if (source != nullptr) at_ = source->allocate(bytes);
    if (at_ != nullptr) {
      source_ = source;
    } else {
      at_ = ::operator new(bytes, std::align_val_t(64));
    }
  }
  ~WorkspaceMemory() {
    if (source_ != nullptr) {
      source_->free(at_);
    } else {
      ::operator delete(at_, std::align_val_t(64));
    }
  }
  WorkspaceMemory(const WorkspaceMemory&) = delete;
  WorkspaceMemory& operator=(const WorkspaceMemory&) = delete;

  void* get() const { return at_; }

 private:
  WorkspaceSource* source_ = nullptr;  // Null: from the heap.
  void* at_ = nullptr;
};

}  // namespace ellm
