// XLA FFI handler of `ellm_pool_threads`: how many threads the kernels run on.
#include "ffi/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

xf::Error pool_threads_impl(xf::ThreadPool pool, xf::Result<xf::Buffer<xf::S32>> out) {
  if (out->element_count() != 1) {
    return xf::Error(xf::ErrorCode::kInvalidArgument,
                     "ellm_pool_threads: the result is one number");
  }
  out->typed_data()[0] = static_cast<int32_t>(pool.num_threads());
  return xf::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pool_threads_handler, pool_threads_impl,
                              xf::Ffi::Bind().Ctx<xf::ThreadPool>().Ret<xf::Buffer<xf::S32>>());

}  // namespace ellm
