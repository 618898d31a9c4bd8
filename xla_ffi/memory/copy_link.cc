#include "memory/copy_link.h"

#include "memory/stream_copy.h"

namespace ellm {
namespace {

class HostLink : public CopyLink {
 public:
  // A second thread would take from the computation what it gives to the copy.
  bool duplex() const override { return false; }

  Status begin(CopyDirection direction, std::byte* chunk, std::byte* block, size_t bytes) override {
    if (direction == CopyDirection::kOffload) {
      stream_copy(block, chunk, bytes);
    } else {
      stream_copy(chunk, block, bytes);
    }
    return Status::Ok();
  }

  Status finish(CopyDirection) override { return Status::Ok(); }
};

}  // namespace

std::unique_ptr<CopyLink> host_link() { return std::make_unique<HostLink>(); }

}  // namespace ellm
