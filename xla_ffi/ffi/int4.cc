// XLA FFI handler of `ellm_linear_int4`: one layer of a stacked int4 weight times the rows in use.
#include "kernels/cpu/int4.h"

#include <cstring>
#include <string>

#include "ffi/element_type.h"
#include "ffi/handlers.h"
#include "ffi/thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

xf::Error refuse(const std::string& message) {
  return xf::Error(xf::ErrorCode::kInvalidArgument, "ellm_linear_int4: " + message);
}

// x [T, K], weight u8[L, P, G, 8 group], scale f16[L, P, G, 16], zero u8[L, P, G, 16] or of no
// elements, layer s32[1], rows s32[1] -> out [T, N]; rows past `rows` are zero.
xf::Error linear_int4_impl(xf::ThreadPool pool, xf::AnyBuffer x, xf::Buffer<xf::U8> weight,
                           xf::Buffer<xf::F16> scale, xf::Buffer<xf::U8> zero,
                           xf::Buffer<xf::S32> layer, xf::Buffer<xf::S32> rows,
                           xf::Result<xf::AnyBuffer> out) {
  const auto xd = x.dimensions();
  const auto wd = weight.dimensions();
  const auto sd = scale.dimensions();
  const auto od = out->dimensions();
  if (xd.size() != 2 || wd.size() != 4 || sd.size() != 4 || od.size() != 2 || od[0] != xd[0] ||
      sd[0] != wd[0] || sd[1] != wd[1] || sd[2] != wd[2] || sd[3] != kInt4Columns) {
    return refuse(
        "x [T, K], weight [L, P, G, 8 group], scale [L, P, G, 16] and result [T, N] do not fit");
  }
  Int4Weights w = {};
  w.group = wd[3] / 8;
  w.n = od[1];
  w.k = xd[1];
  if (wd[3] % 8 != 0 || !int4_group_fits(w.group)) {
    return refuse("groups have 32 or 128 inputs, not " + std::to_string(wd[3]) + "/8");
  }
  if (w.panels() != wd[1] || w.groups() != wd[2]) {
    return refuse(std::to_string(w.n) + " outputs and " + std::to_string(w.k) +
                  " inputs do not fit " + std::to_string(wd[1]) + " panels of 16 and " +
                  std::to_string(wd[2]) + " groups of " + std::to_string(w.group));
  }
  const bool has_zeros = zero.element_count() != 0;
  if (has_zeros && zero.element_count() != scale.element_count()) {
    return refuse("zero points have to be as many as scales, or none");
  }
  ElementType x_type, out_type;
  if (!to_element_type(x.element_type(), &x_type) ||
      !to_element_type(out->element_type(), &out_type)) {
    return refuse("x and the result have to be float32 or bfloat16");
  }
  const int64_t l = layer.typed_data()[0];
  const int64_t used = rows.typed_data()[0];
  if (l < 0 || l >= wd[0] || used < 0 || used > xd[0]) {
    return refuse("layer " + std::to_string(l) + " of " + std::to_string(wd[0]) + ", " +
                  std::to_string(used) + " rows of " + std::to_string(xd[0]));
  }
  const int64_t scales = w.panels() * w.groups() * kInt4Columns;
  w.values = weight.typed_data() + l * scales / 2 * w.group;
  w.scales = static_cast<const uint16_t*>(scale.untyped_data()) + l * scales;
  w.zeros = has_zeros ? zero.typed_data() + l * scales : nullptr;
  XlaParallel parallel(pool);
  int4_linear(
      int4_kernels(), x.untyped_data(), x_type, w, out->untyped_data(), out_type, used,
      [&](int64_t units, const std::function<void(int64_t)>& body) { parallel(units, body); });
  const int64_t row_bytes = w.n * element_bytes(out_type);
  std::memset(static_cast<char*>(out->untyped_data()) + used * row_bytes, 0,
              (xd[0] - used) * row_bytes);
  return xf::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int4_handler, linear_int4_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::U8>>()
                                  .Arg<xf::Buffer<xf::F16>>()
                                  .Arg<xf::Buffer<xf::U8>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>());

}  // namespace ellm
