// An arena as the source of a kernel call's workspaces.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "kernels/cpu/workspace.h"
#include "memory/arena.h"

namespace ellm {

class ArenaWorkspace : public WorkspaceSource {
 public:
  // `arena` may be null: then it is always short.
  explicit ArenaWorkspace(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {}

  void* allocate(size_t bytes) override {
    if (!arena_) return nullptr;
    const Result<std::byte*> at = arena_->allocate(bytes);
    return at.ok() ? at.value() : nullptr;
  }
  void free(void* at) override { (void)arena_->free(static_cast<std::byte*>(at)); }

 private:
  const std::shared_ptr<Arena> arena_;
};

}  // namespace ellm
