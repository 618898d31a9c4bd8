// The host tier and the activation arena as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kv/registry.h"
#include "kv/slot_copy.h"
#include "memory/arena.h"
#include "memory/copy_engine.h"
#include "memory/devices.h"
#include "memory/host_buffer.h"
#include "wrappers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {
namespace {

class PyHostBuffer {
 public:
  PyHostBuffer(int64_t block_bytes, int64_t limit_bytes, const std::string& device)
      : device_(device),
        buffer_(value_or_raise(HostBuffer::Create(
            value_or_raise(unlocked([&] { return open_host_memory(device); })),
            non_negative("block_bytes", block_bytes), non_negative("limit_bytes", limit_bytes)))) {}
  ~PyHostBuffer() {
    end_unlocked([&] { buffer_.reset(); });
  }
  PyHostBuffer(const PyHostBuffer&) = delete;
  PyHostBuffer& operator=(const PyHostBuffer&) = delete;

  const std::shared_ptr<HostBuffer>& get() const { return buffer_; }
  size_t block_bytes() const { return buffer_->block_bytes(); }
  const std::string& device() const { return device_; }

  std::vector<BlockId> take(int64_t n) {
    const size_t count = non_negative("n", n);
    std::vector<BlockId> blocks;
    raise_if_failed(unlocked([&] { return buffer_->take(count, &blocks); }));
    return blocks;
  }

  void give_back(const std::vector<BlockId>& blocks) {
    raise_if_failed(buffer_->give_back(blocks));
  }

  uintptr_t address(BlockId block) {
    const std::vector<std::byte*> at = value_or_raise(buffer_->pin({block}));
    buffer_->unpin({block});
    return reinterpret_cast<uintptr_t>(at[0]);
  }

  void prepare(int64_t bytes) {
    const size_t n = non_negative("bytes", bytes);
    raise_if_failed(unlocked([&] { return buffer_->prepare(n); }));
  }

  void prepare_ahead(int64_t bytes) {
    const size_t n = non_negative("bytes", bytes);
    raise_if_failed(unlocked([&] { return buffer_->prepare_ahead(n); }));
  }

  void close() {
    unlocked([&] { buffer_->close(); });
  }

  void resize(int64_t limit_bytes) {
    const size_t limit = non_negative("limit_bytes", limit_bytes);
    raise_if_failed(unlocked([&] { return buffer_->resize(limit); }));
  }

  size_t trim() {
    return value_or_raise(unlocked([&] { return buffer_->trim(); }));
  }

  nb::dict usage() const {
    const HostUsage u = buffer_->usage();
    nb::dict d;
    d["limit"] = u.limit;
    d["used"] = u.used;
    d["free"] = u.free;
    d["peak_used"] = u.peak_used;
    d["physical"] = u.physical;
    return d;
  }

 private:
  std::string device_;
  std::shared_ptr<HostBuffer> buffer_;
};

class PyCopier {
 public:
  explicit PyCopier(const std::string& device)
      : device_(device),
        copier_(
            std::make_unique<Copier>(value_or_raise(unlocked([&] { return open_link(device); })))) {
  }
  ~PyCopier() {
    end_unlocked([&] { copier_.reset(); });
  }
  PyCopier(const PyCopier&) = delete;
  PyCopier& operator=(const PyCopier&) = delete;

  Ticket offload(const PyKvCache& kv, int32_t slot, int64_t first_tile, const PyHostBuffer& buffer,
                 std::vector<BlockId> blocks) {
    return submit(CopyDirection::kOffload, kv, slot, first_tile, buffer, std::move(blocks));
  }
  Ticket fetch(const PyKvCache& kv, int32_t slot, int64_t first_tile, const PyHostBuffer& buffer,
               std::vector<BlockId> blocks) {
    return submit(CopyDirection::kFetch, kv, slot, first_tile, buffer, std::move(blocks));
  }

  bool done(Ticket ticket) const { return value_or_raise(copier_->done(ticket)); }
  void wait(Ticket ticket) const {
    raise_if_failed(unlocked([&] { return copier_->wait(ticket); }));
  }
  void close() {
    unlocked([&] { copier_->close(); });
  }

  nb::dict stats() const {
    const CopyStats s = copier_->stats();
    nb::dict d;
    d["offload_bytes"] = s.offload.bytes;
    d["offload_us"] = s.offload.us;
    d["offload_calls"] = s.offload.calls;
    d["fetch_bytes"] = s.fetch.bytes;
    d["fetch_us"] = s.fetch.us;
    d["fetch_calls"] = s.fetch.calls;
    return d;
  }

 private:
  Ticket submit(CopyDirection direction, const PyKvCache& kv, int32_t slot, int64_t first_tile,
                const PyHostBuffer& buffer, std::vector<BlockId> blocks) {
    if (kv.get()->pool()->driver().reach() == Reach::kNobody) {
      throw nb::value_error(
          "the KV cache is over a simulated pool, which has no memory to copy; use a copier that "
          "is simulated too");
    }
    if (kv.device() != device_ || buffer.device() != device_) {
      const std::string message = "the KV cache is on " + kv.device() + ", the host buffer for " +
                                  buffer.device() + ", the copier for " + device_ +
                                  "; make all three with the same device";
      throw nb::value_error(message.c_str());
    }
    return value_or_raise(copy_slot(copier_.get(), direction, kv.get(), slot, first_tile,
                                    buffer.get(), std::move(blocks)));
  }

  const std::string device_;
  std::unique_ptr<Copier> copier_;
};

class PyArena {
 public:
  PyArena(const PyPool& pool, int64_t reserved_bytes)
      : arena_(value_or_raise(
            Arena::Create(pool.get(), non_negative("reserved_bytes", reserved_bytes)))) {}
  ~PyArena() {
    end_unlocked([&] { arena_.reset(); });
  }
  PyArena(const PyArena&) = delete;
  PyArena& operator=(const PyArena&) = delete;

  uintptr_t allocate(int64_t bytes) {
    const size_t n = non_negative("bytes", bytes);
    return reinterpret_cast<uintptr_t>(
        value_or_raise(unlocked([&] { return arena_->allocate(n); })));
  }

  void free(uintptr_t address) {
    raise_if_failed(unlocked([&] { return arena_->free(reinterpret_cast<std::byte*>(address)); }));
  }

  size_t collect(int64_t bytes) {
    const size_t n = non_negative("bytes", bytes);
    return value_or_raise(unlocked([&] { return arena_->collect(n); }));
  }

  void serve(const PyKvCache& kv) {
    if (arena_->pool()->driver().reach() != Reach::kHost) {
      throw nb::value_error(
          "the arena is over a simulated pool or a GPU's, but the kernels that use it work in host "
          "memory; make it with a pool of device \"cpu\"");
    }
    use_arena(kv.id(), arena_);
  }

  nb::dict usage() const {
    const ArenaUsage u = unlocked([&] { return arena_->usage(); });
    nb::dict d;
    d["live"] = u.live;
    d["inactive"] = u.inactive;
    d["mapped"] = u.mapped;
    d["reserved"] = u.reserved;
    return d;
  }

 private:
  std::shared_ptr<Arena> arena_;
};

void bind_host_buffer(nb::module_& m) {
  nb::class_<PyHostBuffer>(m, "HostBuffer", "The host tier's memory: blocks under a limit.")
      .def(nb::init<int64_t, int64_t, const std::string&>(), "block_bytes"_a, "limit_bytes"_a,
           "device"_a = "cpu")
      .def_prop_ro("block_bytes", &PyHostBuffer::block_bytes)
      .def_prop_ro("device", &PyHostBuffer::device, "The device that it is host memory for.")
      .def("prepare", &PyHostBuffer::prepare, "bytes"_a,
           "Makes the memory of so many bytes of blocks now, so that take() need not.")
      .def("prepare_ahead", &PyHostBuffer::prepare_ahead, "bytes"_a,
           "Has the same done by a thread of the buffer's own; 0 ends it.")
      .def("close", &PyHostBuffer::close, "Ends that thread; the blocks stay.")
      .def("take", &PyHostBuffer::take, "n"_a,
           "`n` blocks, contents undefined, or OutOfMemory and none.")
      .def("give_back", &PyHostBuffer::give_back, "blocks"_a,
           "Gives blocks back, all or none; their memory is kept for the next take().")
      .def("address", &PyHostBuffer::address, "block"_a, "Where a taken block starts.")
      .def("usage", &PyHostBuffer::usage, "One consistent picture in bytes.")
      .def("resize", &PyHostBuffer::resize, "limit_bytes"_a,
           "Sets the limit. Raises OutOfMemory below what is used.")
      .def("trim", &PyHostBuffer::trim,
           "Gives the memory of blocks that nobody has to the system; returns the bytes.");
}

void bind_copier(nb::module_& m) {
  nb::class_<PyCopier>(m, "Copier", "Copies between KV slots and host blocks, on its own thread.")
      .def(nb::init<const std::string&>(), "device"_a = "cpu")
      .def("offload", &PyCopier::offload, "kv"_a, "slot"_a, "first_tile"_a, "buffer"_a, "blocks"_a,
           "Chunks [first_tile, first_tile + len(blocks)) of the slot to the blocks; a ticket.")
      .def("fetch", &PyCopier::fetch, "kv"_a, "slot"_a, "first_tile"_a, "buffer"_a, "blocks"_a,
           "The reverse of offload().")
      .def("done", &PyCopier::done, "ticket"_a, "Whether the copy is over, well or not.")
      .def("wait", &PyCopier::wait, "ticket"_a,
           "Returns when the copy is over; raises RuntimeError if it failed.")
      .def("stats", &PyCopier::stats, "Bytes, time and finished copies per direction.")
      .def("close", &PyCopier::close, "Ends the thread; copies that are not done have failed.");
}

void bind_arena(nb::module_& m) {
  nb::class_<PyArena>(m, "Arena", "Workspaces in one reserved range over a pool: activations.")
      .def(nb::init<const PyPool&, int64_t>(), "pool"_a, "reserved_bytes"_a)
      .def("allocate", &PyArena::allocate, "bytes"_a,
           "The address of a segment of whole chunks, or OutOfMemory.")
      .def("free", &PyArena::free, "address"_a, "Ends a segment, which stays mapped: inactive.")
      .def("collect", &PyArena::collect, "bytes"_a,
           "Unmaps inactive chunks until `bytes` are back in the pool; returns the bytes given.")
      .def("serve", &PyArena::serve, "kv"_a,
           "The kernels of this KV cache take their workspaces here from now on.")
      .def("usage", &PyArena::usage, "One consistent picture in bytes.");
}

}  // namespace

void bind_tiers(nb::module_& m) {
  bind_host_buffer(m);
  bind_copier(m);
  bind_arena(m);
}

}  // namespace ellm
