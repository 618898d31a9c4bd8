// XLA FFI handler of `ellm_attention_cuda`: checks shapes, finds the memory of its device, enqueues
// the kernels. What a step touches has to be mapped before it is dispatched: the metadata lies on
// the device, where no handler can read it.
#include <cstdint>
#include <memory>
#include <string>

#include "ffi/cuda_handlers.h"
#include "kernels/cuda/attention.h"
#include "kv/kv_cache.h"
#include "kv/registry.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

namespace xf = xla::ffi;

namespace {

xf::Error invalid(const std::string& message) {
  return xf::Error(xf::ErrorCode::kInvalidArgument, "ellm_attention_cuda: " + message);
}

std::string dims(xf::Span<const int64_t> d) {
  std::string text = "[";
  for (size_t i = 0; i < d.size(); ++i) text += (i ? ", " : "") + std::to_string(d[i]);
  return text + "]";
}

bool to_element(xf::DataType type, cuda::Element* element) {
  switch (type) {
    case xf::DataType::F32:
      *element = cuda::Element::kFloat32;
      return true;
    case xf::DataType::BF16:
      *element = cuda::Element::kBFloat16;
      return true;
    case xf::DataType::F16:
      *element = cuda::Element::kFloat16;
      return true;
    default:
      return false;
  }
}

xf::Error as_error(const Status& status) {
  if (status.ok()) return xf::Error::Success();
  const auto code =
      status.code() == Code::kInvalid ? xf::ErrorCode::kInvalidArgument : xf::ErrorCode::kInternal;
  return xf::Error(code, "ellm_attention_cuda: " + status.message());
}

xf::Error attention_impl(CUstream_st* stream, int32_t device_ordinal, xf::AnyBuffer q,
                         xf::AnyBuffer k, xf::AnyBuffer v, xf::Buffer<xf::S32> meta,
                         xf::Buffer<xf::S32> layer, xf::Buffer<xf::S32> window,
                         xf::Buffer<xf::S32> epoch, xf::Result<xf::AnyBuffer> out,
                         xf::Result<xf::Buffer<xf::S32>> epoch_out,
                         xf::Result<xf::Buffer<xf::U8>> workspace, float scale, float soft_cap,
                         int32_t kv_id, int32_t sequences) {
  const auto qd = q.dimensions();
  const auto kd = k.dimensions();
  const auto vd = v.dimensions();
  if (qd.size() != 3 || kd.size() != 3 || vd.size() != 3 || kd[0] != qd[0] || kd[2] != qd[2] ||
      vd[0] != kd[0] || vd[1] != kd[1] || vd[2] != kd[2] || kd[1] == 0 || qd[1] % kd[1] != 0) {
    return invalid("q [rows, q_heads, head_dim] and k, v [rows, kv_heads, head_dim] do not fit: " +
                   dims(qd) + ", " + dims(kd) + ", " + dims(vd));
  }
  cuda::AttentionShape shape;
  if (!to_element(q.element_type(), &shape.element) || k.element_type() != q.element_type() ||
      v.element_type() != q.element_type() || out->element_type() != q.element_type()) {
    return invalid("q, k, v and the result have to be all float32, all bfloat16 or all float16");
  }
  if (layer.element_count() != 1 || window.element_count() != 1 || epoch.element_count() != 1) {
    return invalid("layer has " + std::to_string(layer.element_count()) + " numbers, window " +
                   std::to_string(window.element_count()) + ", epoch " +
                   std::to_string(epoch.element_count()) + "; give one of each");
  }
  if (sequences < 1 || !(scale > 0.0f) || !(soft_cap >= 0.0f)) {
    return invalid("sequences is " + std::to_string(sequences) + ", scale " +
                   std::to_string(scale) + ", soft_cap " + std::to_string(soft_cap) +
                   "; it takes at least 1, a positive one and one that is not negative");
  }
  const std::shared_ptr<KvCache> kv = find_kv(kv_id, device_ordinal);
  if (!kv) {
    return invalid("no KV cache has id " + std::to_string(kv_id) + " on device " +
                   std::to_string(device_ordinal) + "; keep the engine's cache open");
  }
  if (kv->pool()->driver().reach() != Reach::kDevice) {
    return invalid("KV cache " + std::to_string(kv_id) +
                   " is not in device memory; make its pool for the device");
  }
  const KvLayout& layout = kv->layout();
  if (layout.scale_bytes != 0) {
    return invalid("KV cache " + std::to_string(kv_id) +
                   " holds int8 with scales, which only the CPU's kernels read; make its layout "
                   "without scales");
  }
  if (layout.kv_heads != kd[1] || layout.head_dim != kd[2] ||
      layout.element_bytes != cuda::element_bytes(shape.element)) {
    return invalid("k " + dims(kd) + " of " + std::to_string(cuda::element_bytes(shape.element)) +
                   " bytes each does not fit the KV cache of " + std::to_string(layout.kv_heads) +
                   " heads of " + std::to_string(layout.head_dim) + " elements of " +
                   std::to_string(layout.element_bytes) + " bytes");
  }
  shape.rows = qd[0];
  shape.sequences = sequences;
  shape.q_heads = qd[1];
  shape.kv_heads = kd[1];
  shape.head_dim = qd[2];
  shape.max_tokens = layout.max_tokens;

  cuda::AttentionArgs args;
  args.workspace = cuda::Workspace(shape, reinterpret_cast<char*>(workspace->typed_data()));
  if (args.workspace.bytes > static_cast<int64_t>(workspace->element_count())) {
    return invalid("the workspace has " + std::to_string(workspace->element_count()) +
                   " bytes and needs " + std::to_string(args.workspace.bytes) +
                   "; size it for slots of " + std::to_string(layout.max_tokens) + " tokens");
  }
  args.q = q.untyped_data();
  args.k = k.untyped_data();
  args.v = v.untyped_data();
  args.out = out->untyped_data();
  args.step.words = meta.typed_data();
  args.layer = layer.typed_data();
  args.window = window.typed_data();
  args.epoch = epoch.typed_data();
  args.epoch_out = epoch_out->typed_data();
  args.kv = cuda::KvView(layout, reinterpret_cast<char*>(kv->slot_base(0)));
  args.rows = static_cast<int32_t>(qd[0]);
  args.q_heads = static_cast<int32_t>(qd[1]);
  args.head_dim = static_cast<int32_t>(qd[2]);
  args.group = cuda::Divisor(static_cast<int32_t>(qd[1] / kd[1]));
  args.scale = scale;
  args.soft_cap = soft_cap;
  return as_error(cuda::attention(shape, args, stream));
}

}  // namespace

// Compatible with command buffers: only kernels are enqueued, the memory comes as buffers, and
// addresses of the KV cache never change.
XLA_FFI_DEFINE_HANDLER_SYMBOL(cuda_attention_handler, attention_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::PlatformStream<CUstream_st*>>()
                                  .Ctx<xf::DeviceOrdinal>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::AnyBuffer>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Arg<xf::Buffer<xf::S32>>()
                                  .Ret<xf::AnyBuffer>()
                                  .Ret<xf::Buffer<xf::S32>>()
                                  .Ret<xf::Buffer<xf::U8>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("kv_id")
                                  .Attr<int32_t>("sequences"),
                              {xf::Traits::kCmdBufferCompatible});

}  // namespace ellm
