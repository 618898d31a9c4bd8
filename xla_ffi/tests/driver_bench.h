// A driver on the bench.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "fixtures.h"

namespace ellm {

// A reserved range and some memory in pages, given back at the end.
struct Bench {
  Bench(std::shared_ptr<Driver> under_test, size_t range_pages, size_t handle_count = 0)
      : driver(std::move(under_test)), bytes(range_pages * page_bytes()), handles(handle_count) {
    REQUIRE_OK(driver->reserve(bytes, page_bytes(), &base));
    for (Handle& handle : handles) REQUIRE_OK(driver->create(page_bytes(), &handle));
  }
  ~Bench() {
    CHECK_OK(driver->unmap(base, bytes));
    for (const Handle handle : handles) CHECK_OK(driver->destroy(handle, page_bytes()));
    CHECK_OK(driver->release(base, bytes));
  }
  std::byte* page(size_t i) const { return base + i * page_bytes(); }

  std::shared_ptr<Driver> driver;
  std::byte* base = nullptr;
  size_t bytes;
  std::vector<Handle> handles;
};

}  // namespace ellm
