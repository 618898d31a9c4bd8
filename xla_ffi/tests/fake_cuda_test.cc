// The fake notices what it is there to notice: every rule is broken once.
#include "fake_cuda.h"

#include <functional>
#include <string>

#include "cuda_gpu.h"

namespace ellm {
namespace {

// Two chunks of memory and a range of four chunks, by the bare functions.
struct Bare {
  Bare() : fake({kCudaChunk, 64 * kMiB, 2}), api(fake.api()) {
    CHECK_EQ(api.init(0), 0);
    CHECK_EQ(api.context_retain(&context, 0), 0);
    CHECK_EQ(api.context_push(context), 0);
    CHECK_EQ(api.address_reserve(&base, 4 * kCudaChunk, kCudaChunk, 0, 0), 0);
    prop.type = cu::kAllocationPinned;
    prop.location = {cu::kLocationDevice, 0};
    for (cu::Allocation& a : memory) CHECK_EQ(api.create(&a, kCudaChunk, &prop, 0), 0);
  }
  cu::Address chunk(size_t i) const { return base + i * kCudaChunk; }
  std::byte* at(size_t i) const { return reinterpret_cast<std::byte*>(chunk(i)); }
  cu::ReturnCode map(size_t i, size_t which) {
    return api.map(chunk(i), kCudaChunk, 0, memory[which], 0);
  }
  cu::ReturnCode allow(size_t first, size_t n) {
    return api.set_access(chunk(first), n * kCudaChunk, &access, 1);
  }
  bool noticed(const char* rule) const { return fake.violations().find(rule) != std::string::npos; }

  FakeCuda fake;
  const CudaApi& api;
  cu::Context context = nullptr;
  cu::Address base = 0;
  cu::AllocationProp prop{};
  cu::AccessDesc access{{cu::kLocationDevice, 0}, cu::kAccessReadWrite};
  cu::Allocation memory[2] = {};
};

TEST(good_manners_are_no_violation) {
  Bare b;
  CHECK_EQ(b.map(0, 0), 0);
  CHECK_EQ(b.map(1, 1), 0);
  CHECK_EQ(b.map(3, 0), 0);  // The first at a second address.
  CHECK(!readable(b.at(0)));
  CHECK_EQ(b.allow(0, 2), 0);
  CHECK_EQ(b.allow(3, 1), 0);
  *b.at(0) = std::byte{9};
  CHECK_EQ(static_cast<int>(*b.at(3)), 9);
  CHECK_EQ(b.api.unmap(b.chunk(0), 2 * kCudaChunk), 0);
  CHECK(!readable(b.at(0)));
  CHECK_EQ(b.api.unmap(b.chunk(3), kCudaChunk), 0);
  for (const cu::Allocation a : b.memory) CHECK_EQ(b.api.release(a), 0);
  CHECK_EQ(b.api.address_free(b.base, 4 * kCudaChunk), 0);
  cu::Context popped;
  CHECK_EQ(b.api.context_pop(&popped), 0);
  CHECK_EQ(b.api.context_release(0), 0);
  CHECK_EQ(b.fake.violations(), "");
  CHECK_EQ(b.fake.leftovers(), "");
}

TEST(sizes_and_addresses_are_checked) {
  Bare b;
  cu::Allocation a;
  CHECK_EQ(b.api.create(&a, kMiB, &b.prop, 0), cu::kInvalidValue);
  CHECK_EQ(b.api.map(b.base + kMiB, kCudaChunk, 0, b.memory[0], 0), cu::kInvalidValue);
  CHECK_EQ(b.api.map(b.base, 2 * kCudaChunk, 0, b.memory[0], 0), cu::kInvalidValue);
  CHECK_EQ(b.api.map(b.base, kCudaChunk, 0, 12345, 0), cu::kInvalidValue);
  CHECK_EQ(b.allow(0, 1), cu::kInvalidValue);
  CHECK_EQ(b.api.unmap(b.base, kCudaChunk), cu::kInvalidValue);
  CHECK_EQ(b.api.create(&a, 62 * kMiB, &b.prop, 0), cu::kOutOfMemory);
  CHECK_EQ(b.fake.violations(), "");
}

TEST(mapping_rules) {
  Bare b;
  CHECK_EQ(b.map(0, 0), 0);
  CHECK_EQ(b.map(0, 1), cu::kInvalidValue);
  CHECK(b.noticed("map over a mapping"));
  CHECK_EQ(b.map(4, 1), cu::kInvalidValue);
  CHECK(b.noticed("map outside of every reserved range"));
  CHECK_EQ(b.api.address_free(b.base, 4 * kCudaChunk), cu::kInvalidValue);
  CHECK(b.noticed("a range goes in which something is mapped"));
  CHECK_EQ(b.api.release(b.memory[0]), 0);
  CHECK(b.noticed("memory is released while it is mapped"));
}

TEST(a_mapping_goes_as_a_whole) {
  FakeCuda fake({kMiB, 64 * kMiB});
  {
    const auto device = CudaDevice::Open(fake.api(), 0).value();
    const CudaDevice::Current current(*device);
    cu::Address base;
    cu::Allocation a;
    cu::AllocationProp prop{};
    prop.type = cu::kAllocationPinned;
    prop.location.type = cu::kLocationDevice;
    CHECK_EQ(fake.api().address_reserve(&base, 2 * kMiB, 0, 0, 0), 0);
    CHECK_EQ(fake.api().create(&a, 2 * kMiB, &prop, 0), 0);
    CHECK_EQ(fake.api().map(base, 2 * kMiB, 0, a, 0), 0);
    CHECK_EQ(fake.api().unmap(base + kMiB, kMiB), cu::kInvalidValue);
  }
  CHECK(fake.violations().find("unmap of a part of a mapping") != std::string::npos);
}

TEST(contexts_have_to_be_current_and_right) {
  Bare b;
  cu::Context other;
  CHECK_EQ(b.api.context_retain(&other, 1), 0);
  CHECK_EQ(b.api.context_push(other), 0);
  cu::Allocation a;
  CHECK_EQ(b.api.create(&a, kCudaChunk, &b.prop, 0), 0);
  CHECK(b.noticed("made on a device that is not current"));
  CHECK_EQ(b.map(0, 0), 0);
  CHECK(b.noticed("memory of a device that is not current"));
  cu::Context popped;
  CHECK_EQ(b.api.context_pop(&popped), 0);
  CHECK(popped == other);
  CHECK_EQ(b.api.context_pop(&popped), 0);
  CHECK_EQ(b.api.unmap(b.base, kCudaChunk), cu::kInvalidContext);
  CHECK(b.noticed("cuMemUnmap without a current context"));
  CHECK_EQ(b.api.context_push(b.context), 0);
  CHECK_EQ(b.api.context_release(0), 0);
  CHECK_EQ(b.api.context_synchronize(), cu::kInvalidContext);
  CHECK(b.noticed("with a context that was released"));
}

TEST(what_is_in_flight_keeps_its_memory) {
  Bare b;
  CHECK_EQ(b.map(0, 0), 0);
  CHECK_EQ(b.map(1, 1), 0);
  CHECK_EQ(b.allow(0, 2), 0);
  b.fake.launch(0, b.at(0), kCudaChunk);
  CHECK_EQ(b.api.unmap(b.chunk(1), kCudaChunk), 0);
  CHECK_EQ(b.fake.violations(), "");
  b.fake.finish_kernels();
  b.fake.launch(0, b.at(0) + 100, 1000);
  CHECK(b.noticed("a kernel touches memory that is not mapped"));
  b.fake.launch(0, b.at(0), kCudaChunk);
  CHECK_EQ(b.api.unmap(b.chunk(0), kCudaChunk), 0);
  CHECK(b.noticed("unmap of what a kernel or a copy touches"));
}

TEST(copies_wait_for_somebody_who_waits) {
  Bare b;
  CHECK_EQ(b.map(0, 0), 0);
  CHECK_EQ(b.allow(0, 1), 0);
  cu::Stream stream;
  cu::Event event;
  CHECK_EQ(b.api.stream_create(&stream, cu::kStreamNonBlocking), 0);
  CHECK_EQ(b.api.event_create(&event, cu::kEventBlockingSync), 0);
  std::byte host[64] = {std::byte{5}};
  CHECK_EQ(b.api.copy_to_device(b.chunk(0), host, sizeof host, stream), 0);
  CHECK(b.noticed("not pinned"));
  CHECK_EQ(b.api.host_register(host, sizeof host, cu::kRegisterPortable), 0);
  CHECK_EQ(b.api.host_register(host, sizeof host, cu::kRegisterPortable), cu::kAlreadyRegistered);
  CHECK_EQ(b.api.event_record(event, stream), 0);
  host[0] = std::byte{6};
  CHECK_EQ(b.api.copy_to_device(b.chunk(0) + 64, host, sizeof host, stream), 0);
  CHECK_EQ(static_cast<int>(*b.at(0)), 0);
  CHECK_EQ(b.api.event_synchronize(event), 0);
  CHECK_EQ(static_cast<int>(b.at(0)[0]), 6);  // It was read too late, as it may be.
  CHECK_EQ(static_cast<int>(b.at(0)[64]), 0);
  CHECK_EQ(b.api.host_unregister(host), 0);
  CHECK(b.noticed("unpinning of what a copy touches"));
  CHECK_EQ(b.api.stream_synchronize(stream), 0);
  CHECK_EQ(static_cast<int>(b.at(0)[64]), 6);
  CHECK_EQ(b.api.host_unregister(host), cu::kNotRegistered);
}

}  // namespace
}  // namespace ellm
