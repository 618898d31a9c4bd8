// XLA FFI handler of `ellm_linear_int8`: one layer of a stacked int8 weight times the rows in use.
#include "kernels/cpu/int8.h"

#include <cstring>
#include <string>

#include "ffi/element_type.h"
#include "ffi/finish.h"
#include "ffi/handlers.h"
#include "ffi/thread_pool.h"
#include "kernels/cpu/panels.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

xf::Error refuse(const std::string& message) {
  return xf::Error(xf::ErrorCode::kInvalidArgument, "ellm_linear_int8: " + message);
}

// x [T, K], weight s8[L, N, K], scale f32[L, N], bias [N] or [0], add [T, N] or [0], layer s32[1],
// rows s32[1] -> out [T, N]; rows past `rows` are zero. With `panels` each layer of the weight is
// in panels; only then may there be a bias or something to add, and with `gated`, out [T, N / 2].
xf::Error linear_int8_impl(xf::ThreadPool pool, xf::AnyBuffer x, xf::Buffer<xf::S8> weight,
                           xf::Buffer<xf::F32> scale, xf::AnyBuffer bias, xf::AnyBuffer add,
                           xf::Buffer<xf::S32> layer, xf::Buffer<xf::S32> rows,
                           xf::Result<xf::AnyBuffer> out, bool panels, bool gated) {
  const auto xd = x.dimensions();
  const auto wd = weight.dimensions();
  const auto sd = scale.dimensions();
  const auto od = out->dimensions();
  if (xd.size() != 2 || wd.size() != 3 || sd.size() != 2 || od.size() != 2 || xd[1] != wd[2] ||
      sd[0] != wd[0] || sd[1] != wd[1] || od[0] != xd[0] || od[1] != wd[1] / (gated ? 2 : 1)) {
    return refuse("x [T, K], weight [L, N, K], scale [L, N] and result [T, N] do not fit");
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
  const int64_t n = wd[1];
  const int64_t k = wd[2];
  if (k > kInt8MaxK) {
    return refuse("rows of " + std::to_string(k) + " elements, of which at most " +
                  std::to_string(kInt8MaxK) + " can be summed in int32");
  }
  if (panels && (int8_kernels().linear_panels == nullptr || k % kWordBytes != 0)) {
    return refuse("weights in panels take AVX-512 VNNI and a multiple of 4 inputs, not " +
                  std::to_string(k));
  }
  Finish finish;
  if (const std::string error = read_finish(bias, add, gated, xd[0], n, panels, out_type, &finish);
      !error.empty()) {
    return refuse(error);
  }
  const int8_t* w = weight.typed_data() + l * n * k;
  const float* w_scale = scale.typed_data() + l * n;
  XlaParallel parallel(pool);
  const auto spread = [&](int64_t units, const std::function<void(int64_t)>& body) {
    parallel(units, body);
  };
  if (panels) {
    int8_linear_panels(int8_kernels(), x.untyped_data(), x_type, w, w_scale, out->untyped_data(),
                       out_type, used, n, k, spread, parallel.num_threads(), finish);
  } else {
    int8_linear(int8_kernels(), x.untyped_data(), x_type, w, w_scale, out->untyped_data(), out_type,
                used, n, k, spread, parallel.num_threads());
  }
  const int64_t row_bytes = od[1] * element_bytes(out_type);
  std::memset(static_cast<char*>(out->untyped_data()) + used * row_bytes, 0,
              (xd[0] - used) * row_bytes);
  return xf::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8_handler, linear_int8_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S8>>()
                                  .Arg<xf::Buffer<xf::F32>>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>()
                                  .Attr<bool>("panels")
                                  .Attr<bool>("gated"));

}  // namespace ellm
