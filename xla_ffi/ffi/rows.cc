// XLA FFI handlers of the row-wise operations `ellm_rms_norm`, `ellm_silu_mul` and
// `ellm_likeliest`.
#include "ffi/element_type.h"
#include "ffi/handlers.h"
#include "ffi/used_rows.h"
#include "kernels/cpu/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

// x [T, N] or [T, heads, N], scale [N], rows s32[1] -> like x.
xf::Error rms_norm_impl(xf::ThreadPool pool, xf::AnyBuffer x, xf::AnyBuffer scale,
                        xf::Buffer<xf::S32> rows, xf::Result<xf::AnyBuffer> out, float eps) {
  const auto xd = x.dimensions();
  ElementType type;
  if (!to_element_type(x.element_type(), &type) || scale.element_type() != x.element_type() ||
      out->element_type() != x.element_type() || xd.size() < 2 || xd.size() > 3 ||
      scale.dimensions().size() != 1 || scale.dimensions()[0] != xd.back() ||
      out->element_count() != x.element_count()) {
    return refuse("ellm_rms_norm: x [T, N] or [T, heads, N] and scale [N] do not fit");
  }
  const int64_t n = xd.back();
  const int64_t heads = xd.size() == 3 ? xd[1] : 1;
  const int64_t bytes = heads * n * element_bytes(type);
  const auto* from = static_cast<const char*>(x.untyped_data());
  auto* to = static_cast<char*>(out->untyped_data());
  return for_used_rows(pool, rows, xd[0], heads * n, {{to, bytes}},
                       [&](int64_t first, int64_t count) {
                         kernels().rms_norm(from + first * bytes, scale.untyped_data(),
                                            to + first * bytes, type, count * heads, n, eps);
                       });
}

// x [T, 2 N], rows s32[1] -> [T, N].
xf::Error silu_mul_impl(xf::ThreadPool pool, xf::AnyBuffer x, xf::Buffer<xf::S32> rows,
                        xf::Result<xf::AnyBuffer> out) {
  const auto xd = x.dimensions();
  const auto od = out->dimensions();
  ElementType type;
  if (!to_element_type(x.element_type(), &type) || out->element_type() != x.element_type() ||
      xd.size() != 2 || od.size() != 2 || od[0] != xd[0] || xd[1] != 2 * od[1]) {
    return refuse("ellm_silu_mul: x [T, 2 N] and result [T, N] do not fit");
  }
  const int64_t n = od[1];
  const int64_t bytes = n * element_bytes(type);
  const auto* from = static_cast<const char*>(x.untyped_data());
  auto* to = static_cast<char*>(out->untyped_data());
  return for_used_rows(pool, rows, xd[0], n, {{to, bytes}}, [&](int64_t first, int64_t count) {
    kernels().silu_mul(from + first * 2 * bytes, to + first * bytes, type, count, n);
  });
}

// scores [S, V], rows s32[1] -> s32[S].
xf::Error likeliest_impl(xf::ThreadPool pool, xf::Buffer<xf::F32> scores, xf::Buffer<xf::S32> rows,
                         xf::Result<xf::Buffer<xf::S32>> out) {
  const auto sd = scores.dimensions();
  if (sd.size() != 2 || static_cast<int64_t>(out->element_count()) != sd[0]) {
    return refuse("ellm_likeliest: scores [S, V] and result [S] do not fit");
  }
  const float* from = scores.typed_data();
  int32_t* to = out->typed_data();
  return for_used_rows(
      pool, rows, sd[0], sd[1], {{to, sizeof(int32_t)}}, [&](int64_t first, int64_t count) {
        for (int64_t row = first; row < first + count; ++row) {
          to[row] = static_cast<int32_t>(kernels().likeliest(from + row * sd[1], sd[1]));
        }
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rms_norm_handler, rms_norm_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(silu_mul_handler, silu_mul_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(likeliest_handler, likeliest_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::Buffer<xf::F32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::Buffer<xf::S32>>());

}  // namespace ellm
