// XLA FFI handler of `ellm_attention`: checks the step against the mapped memory, writes the new
// K and V, attends.
#include "kernels/cpu/attention.h"

#include <cstring>
#include <memory>
#include <string>

#include "ffi/handlers.h"
#include "ffi/thread_pool.h"
#include "kernels/cpu/arena_workspace.h"
#include "kernels/cpu/dispatch.h"
#include "kv/kv_cache.h"
#include "kv/registry.h"
#include "kv/step.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

xf::Error invalid(const std::string& message) {
  return xf::Error(xf::ErrorCode::kInvalidArgument, "ellm_attention: " + message);
}

std::string dims(xf::Span<const int64_t> d) {
  std::string text = "[";
  for (size_t i = 0; i < d.size(); ++i) text += (i ? ", " : "") + std::to_string(d[i]);
  return text + "]";
}

xf::Error from_status(const Status& s) {
  const bool unmapped = s.code() == Code::kNotMapped;
  return xf::Error(unmapped ? xf::ErrorCode::kFailedPrecondition : xf::ErrorCode::kInvalidArgument,
                   "ellm_attention: " + s.message());
}

xf::Error attention_impl(xf::ThreadPool pool, int32_t device_ordinal, xf::AnyBuffer q,
                         xf::AnyBuffer k, xf::AnyBuffer v, xf::Buffer<xf::S32> meta,
                         xf::Buffer<xf::S32> layer_and_window, xf::Buffer<xf::S32> epoch,
                         xf::Result<xf::AnyBuffer> out, xf::Result<xf::Buffer<xf::S32>> epoch_out,
                         float scale, float soft_cap) {
  const auto qd = q.dimensions();
  const auto kd = k.dimensions();
  const auto vd = v.dimensions();
  if (qd.size() != 3 || kd.size() != 3 || vd.size() != 3 || kd[0] != qd[0] || kd[2] != qd[2] ||
      vd[0] != kd[0] || vd[1] != kd[1] || vd[2] != kd[2] || kd[1] == 0 || qd[1] % kd[1] != 0) {
    return invalid("q [rows, q_heads, head_dim] and k, v [rows, kv_heads, head_dim] do not fit: " +
                   dims(qd) + ", " + dims(kd) + ", " + dims(vd));
  }
  const auto type = q.element_type();
  if ((type != xf::DataType::F32 && type != xf::DataType::BF16) || k.element_type() != type ||
      v.element_type() != type || out->element_type() != type) {
    return invalid("q, k, v and the result have to be all float32 or all bfloat16");
  }
  const Result<StepView> view = view_step(meta.typed_data(), meta.element_count());
  if (!view.ok()) return from_status(view.status());
  const StepView& step = view.value();
  const StepHeader& header = step.header;
  if (layer_and_window.element_count() != 2) return invalid("layer and window are two numbers");
  // Unsigned, so that it may wrap around.
  epoch_out->typed_data()[0] =
      static_cast<int32_t>(static_cast<uint32_t>(epoch.typed_data()[0]) + 1u);

  const int64_t rows = qd[0];
  const int64_t row_bytes = qd[1] * qd[2] * (type == xf::DataType::F32 ? 4 : 2);
  if (header.num_rows > rows) {
    return invalid("metadata counts " + std::to_string(header.num_rows) + " rows, q has " +
                   std::to_string(rows));
  }
  char* padding = static_cast<char*>(out->untyped_data()) + header.num_rows * row_bytes;
  std::memset(padding, 0, (rows - header.num_rows) * row_bytes);
  if (header.num_sequences == 0) return xf::Error::Success();

  const std::shared_ptr<KvCache> kv = find_kv(header.kv_id, device_ordinal);
  if (!kv) {
    return invalid("no KV cache has id " + std::to_string(header.kv_id) + " on device " +
                   std::to_string(device_ordinal));
  }
  const KvLayout& layout = kv->layout();
  const int64_t layer = layer_and_window.typed_data()[0];
  AttentionArgs args;
  args.type = type == xf::DataType::F32 ? ElementType::kFloat32 : ElementType::kBFloat16;
  const bool as_held = layout.scale_bytes != 0 || layout.element_bytes == element_bytes(args.type);
  if (layout.kv_heads != kd[1] || layout.head_dim != kd[2] || !as_held || layer < 0 ||
      layer >= layout.layers) {
    return invalid("layer " + std::to_string(layer) + " with k " + dims(kd) +
                   " does not fit the KV cache of " + std::to_string(layout.layers) + " layers, " +
                   std::to_string(layout.kv_heads) + " heads of " +
                   std::to_string(layout.head_dim) + " elements of " +
                   std::to_string(layout.element_bytes) + " bytes");
  }
  if (const Status s = check_step(*kv, step); !s.ok()) return from_status(s);
  if (kv->pool()->driver().reach() != Reach::kHost) {
    return invalid("KV cache " + std::to_string(header.kv_id) +
                   " is not in host memory; use the attention of its device");
  }

  args.q = q.untyped_data();
  args.out = out->untyped_data();
  args.q_heads = qd[1];
  args.kv = layout;
  args.kv_base = reinterpret_cast<char*>(kv->slot_base(0));
  args.layer = layer;
  args.window = layer_and_window.typed_data()[1];
  args.scale = scale;
  args.soft_cap = soft_cap;
  args.part_tokens = kPartTokens;

  XlaParallel parallel(pool);
  const ParallelFor run = [&](int64_t units, const std::function<void(int64_t)>& body) {
    parallel(units, body);
  };
  write_kv(args, k.untyped_data(), v.untyped_data(), step.spans, header.num_sequences, run);
  ArenaWorkspace workspaces(find_arena(header.kv_id, device_ordinal));
  attention(kernels(), args, step.spans, header.num_sequences, parallel.num_threads(), run,
            &workspaces);
  return xf::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_handler, attention_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
                                  .Ctx<xf::DeviceOrdinal>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>()
                                  .Ret<xf::Buffer<xf::S32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));

}  // namespace ellm
