// XLA FFI handler of `ellm_attention`: checks the step against the mapped memory, writes the new
// K and V, attends.
#include "kernels/cpu/attention.h"

#include <cstring>
#include <memory>
#include <string>

#include "ffi/handlers.h"
#include "ffi/step_header.h"
#include "ffi/thread_pool.h"
#include "kernels/cpu/arena_workspace.h"
#include "kernels/cpu/dispatch.h"
#include "kv/kv_cache.h"
#include "kv/registry.h"
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

// Every span inside the batch, and inside what is mapped of its slot.
xf::Error check_spans(const KvCache& kv, const SequenceSpan* spans, const StepHeader& header,
                      int64_t rows) {
  for (int32_t i = 0; i < header.num_sequences; ++i) {
    const SequenceSpan& s = spans[i];
    if (s.row_begin < 0 || s.row_count < 0 || s.context_tokens < 0 ||
        int64_t{s.row_begin} + s.row_count > rows) {
      return invalid("sequence " + std::to_string(i) + " takes rows " +
                     std::to_string(s.row_begin) + " to " +
                     std::to_string(int64_t{s.row_begin} + s.row_count) + " after " +
                     std::to_string(s.context_tokens) + " tokens, the step has " +
                     std::to_string(rows) + " rows");
    }
    if (s.slot < 0 || s.slot >= kv.layout().num_slots) {
      return invalid("sequence " + std::to_string(i) + " names slot " + std::to_string(s.slot) +
                     ", the KV cache has slots 0 to " + std::to_string(kv.layout().num_slots - 1));
    }
    const int64_t end = int64_t{s.context_tokens} + s.row_count;
    const int64_t mapped = kv.mapped_tokens(s.slot);
    if (end > mapped) {
      return xf::Error(xf::ErrorCode::kFailedPrecondition,
                       "ellm_attention: slot " + std::to_string(s.slot) + " is to hold tokens " +
                           std::to_string(s.context_tokens) + " to " + std::to_string(end) +
                           " but only " + std::to_string(mapped) +
                           " tokens are mapped; extend the slot before the step");
    }
  }
  return xf::Error::Success();
}

xf::Error attention_impl(xf::ThreadPool pool, xf::AnyBuffer q, xf::AnyBuffer k, xf::AnyBuffer v,
                         xf::Buffer<xf::S32> meta, xf::Buffer<xf::S32> layer_and_window,
                         xf::Buffer<xf::S32> epoch, xf::Result<xf::AnyBuffer> out,
                         xf::Result<xf::Buffer<xf::S32>> epoch_out, float scale, float soft_cap) {
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
  StepHeader header;
  if (meta.element_count() < sizeof(header) / sizeof(int32_t) ||
      layer_and_window.element_count() != 2) {
    return invalid("metadata is too short");
  }
  std::memcpy(&header, meta.typed_data(), sizeof header);
  // Unsigned, so that it may wrap around.
  epoch_out->typed_data()[0] =
      static_cast<int32_t>(static_cast<uint32_t>(epoch.typed_data()[0]) + 1u);

  const int64_t rows = qd[0];
  const int64_t row_bytes = qd[1] * qd[2] * (type == xf::DataType::F32 ? 4 : 2);
  if (header.num_rows < 0 || header.num_rows > rows) {
    return invalid("metadata counts " + std::to_string(header.num_rows) + " rows, q has " +
                   std::to_string(rows));
  }
  char* padding = static_cast<char*>(out->untyped_data()) + header.num_rows * row_bytes;
  std::memset(padding, 0, (rows - header.num_rows) * row_bytes);
  if (header.num_sequences == 0) return xf::Error::Success();

  const std::shared_ptr<KvCache> kv = find_kv(header.kv_id);
  if (!kv) return invalid("no KV cache has id " + std::to_string(header.kv_id));
  const KvLayout& layout = kv->layout();
  const int64_t layer = layer_and_window.typed_data()[0];
  AttentionArgs args;
  args.type = type == xf::DataType::F32 ? ElementType::kFloat32 : ElementType::kBFloat16;
  if (layout.kv_heads != kd[1] || layout.head_dim != kd[2] ||
      layout.element_bytes != element_bytes(args.type) || layer < 0 || layer >= layout.layers) {
    return invalid("layer " + std::to_string(layer) + " with k " + dims(kd) +
                   " does not fit the KV cache of " + std::to_string(layout.layers) + " layers, " +
                   std::to_string(layout.kv_heads) + " heads of " +
                   std::to_string(layout.head_dim) + " elements of " +
                   std::to_string(layout.element_bytes) + " bytes");
  }
  const int64_t spans_end =
      header.spans_offset + int64_t{header.num_sequences} * sizeof(SequenceSpan) / sizeof(int32_t);
  if (header.spans_offset < 0 || spans_end > static_cast<int64_t>(meta.element_count())) {
    return invalid("metadata ends before its " + std::to_string(header.num_sequences) +
                   " sequences");
  }
  const auto* spans =
      reinterpret_cast<const SequenceSpan*>(meta.typed_data() + header.spans_offset);
  if (xf::Error error = check_spans(*kv, spans, header, header.num_rows); error.failure()) {
    return error;
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
  write_kv(args, k.untyped_data(), v.untyped_data(), spans, header.num_sequences, run);
  ArenaWorkspace workspaces(find_arena(header.kv_id));
  attention(kernels(), args, spans, header.num_sequences, parallel.num_threads(), run, &workspaces);
  return xf::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_handler, attention_impl,
                              xf::Ffi::Bind()
                                  .Ctx<xf::ThreadPool>()
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
