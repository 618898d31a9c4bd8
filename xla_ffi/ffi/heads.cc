// XLA FFI handler of `ellm_heads`.
#include <string>

#include "ffi/element_type.h"
#include "ffi/handlers.h"
#include "ffi/used_rows.h"
#include "kernels/cpu/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

bool is_matrix_of_heads(xf::AnyBuffer& buffer, xf::DataType type, int64_t tokens, int64_t dim) {
  const auto d = buffer.dimensions();
  return buffer.element_type() == type && d.size() == 3 && d[0] == tokens && d[2] == dim;
}

// qkv [T, (Hq + 2 Hkv) D], cos and sin [T, D / 2], norms [D] or [0], rows s32[1] -> [T, Hq, D] and
// twice [T, Hkv, D].
xf::Error heads_impl(xf::ThreadPool pool, xf::AnyBuffer qkv, xf::Buffer<xf::F32> cos,
                     xf::Buffer<xf::F32> sin, xf::AnyBuffer q_norm, xf::AnyBuffer k_norm,
                     xf::Buffer<xf::S32> rows, xf::Result<xf::AnyBuffer> q,
                     xf::Result<xf::AnyBuffer> k, xf::Result<xf::AnyBuffer> v, float eps) {
  const auto xd = qkv.dimensions();
  const xf::DataType type = qkv.element_type();
  HeadsArgs args;
  if (!to_element_type(type, &args.type) || xd.size() != 2 || q->dimensions().size() != 3) {
    return refuse("ellm_heads: qkv [T, (Hq + 2 Hkv) D] and q [T, Hq, D] do not fit");
  }
  const int64_t tokens = xd[0];
  const int64_t dim = q->dimensions()[2];
  args.head_dim = dim;
  args.q_heads = q->dimensions()[1];
  const auto is_norm = [&](xf::AnyBuffer& norm) {
    const int64_t count = norm.element_count();
    return norm.element_type() == type && (count == 0 || count == dim);
  };
  if (!is_matrix_of_heads(*q, type, tokens, dim) || !is_matrix_of_heads(*k, type, tokens, dim) ||
      !is_matrix_of_heads(*v, type, tokens, dim) || k->dimensions()[1] != v->dimensions()[1] ||
      dim % 2 != 0 || xd[1] != (args.q_heads + 2 * k->dimensions()[1]) * dim ||
      static_cast<int64_t>(cos.element_count()) != tokens * dim / 2 ||
      sin.element_count() != cos.element_count() || !is_norm(q_norm) || !is_norm(k_norm)) {
    return refuse("ellm_heads: the heads, rotations and norms do not fit qkv [" +
                  std::to_string(tokens) + ", " + std::to_string(xd[1]) + "]");
  }
  if (dim > kMaxHeadDim) {
    return refuse("ellm_heads: heads of " + std::to_string(dim) + " elements; there may be " +
                  std::to_string(kMaxHeadDim));
  }
  args.kv_heads = k->dimensions()[1];
  args.qkv = qkv.untyped_data();
  args.cos = cos.typed_data();
  args.sin = sin.typed_data();
  args.q_norm = q_norm.element_count() > 0 ? q_norm.untyped_data() : nullptr;
  args.k_norm = k_norm.element_count() > 0 ? k_norm.untyped_data() : nullptr;
  args.eps = eps;
  args.q = q->untyped_data();
  args.k = k->untyped_data();
  args.v = v->untyped_data();
  return for_used_rows(
      pool, rows, tokens, xd[1],
      {{args.q, args.q_heads * dim * element_bytes(args.type)},
       {args.k, args.kv_heads * dim * element_bytes(args.type)},
       {args.v, args.kv_heads * dim * element_bytes(args.type)}},
      [&](int64_t first, int64_t count) { kernels().heads(args, first, first + count); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(heads_handler, heads_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::F32>>()
                                  .Arg<xf::Buffer<xf::F32>>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>()
                                  .Ret<xf::AnyBuffer>()
                                  .Ret<xf::AnyBuffer>()
                                  .Attr<float>("eps"));

}  // namespace ellm
