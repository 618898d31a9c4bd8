// Work over the rows of a step that are in use, dealt out to XLA's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "ffi/thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

inline xla::ffi::Error refuse(const std::string& message) {
  return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, message);
}

// Elements a thread takes at a time; fewer are not worth handing out, which takes as long as the
// norm of some 100,000.
constexpr int64_t kElementsPerUnit = 64 * 1024;

// A result of a row-wise operation: where it lies, and the bytes of a token in it.
struct RowsOut {
  void* data;
  int64_t token_bytes;
};

// Calls body(first token, tokens) for the tokens in use of a step, each of so many elements; the
// rest of the results becomes zero.
template <class Body>
xla::ffi::Error for_used_rows(xla::ffi::ThreadPool pool,
                              xla::ffi::Buffer<xla::ffi::S32> used_tokens, int64_t tokens,
                              int64_t token_elements, std::initializer_list<RowsOut> results,
                              Body body) {
  const int64_t used = used_tokens.typed_data()[0];
  if (used < 0 || used > tokens) {
    return refuse(std::to_string(used) + " tokens in use of " + std::to_string(tokens));
  }
  const int64_t step =
      std::max<int64_t>(1, kElementsPerUnit / std::max<int64_t>(1, token_elements));
  XlaParallel parallel(pool);
  parallel((used + step - 1) / step,
           [&](int64_t unit) { body(unit * step, std::min(step, used - unit * step)); });
  for (const RowsOut& result : results) {
    std::memset(static_cast<char*>(result.data) + used * result.token_bytes, 0,
                (tokens - used) * result.token_bytes);
  }
  return xla::ffi::Error::Success();
}

}  // namespace ellm
