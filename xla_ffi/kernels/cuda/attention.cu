#include "kernels/cuda/attention.h"
#include "kernels/cuda/dispatch.h"

namespace ellm::cuda {

namespace {

Status run(const AttentionShape& shape, const AttentionArgs& args, StreamLauncher* launcher) {
  if (shape.head_dim > kMostHeadDim) {
    return Status(Code::kInvalid, "head_dim is " + std::to_string(shape.head_dim) +
                                      "; the CUDA kernels take up to " +
                                      std::to_string(kMostHeadDim) + ". Use device=\"cpu\".");
  }
  if (!on_tensor_cores(shape)) return run_exact(shape.element, args, launcher);
  return shape.element == Element::kBFloat16 ? run_bfloat16(args, launcher)
                                             : run_float16(args, launcher);
}

Status load_on_current(const AttentionShape& shape) {
  AttentionArgs args;
  args.rows = static_cast<int32_t>(shape.rows);
  args.q_heads = static_cast<int32_t>(shape.q_heads);
  args.head_dim = static_cast<int32_t>(shape.head_dim);
  args.group = Divisor(static_cast<int32_t>(shape.q_heads / shape.kv_heads));
  args.kv.kv_heads = static_cast<int32_t>(shape.kv_heads);
  args.kv.row_bytes = shape.head_dim * element_bytes(shape.element);
  args.workspace = Workspace(shape, nullptr);
  StreamLauncher launcher(nullptr, true);
  return run(shape, args, &launcher);
}

}  // namespace

Status attention(const AttentionShape& shape, const AttentionArgs& args, CUstream_st* stream) {
  StreamLauncher launcher(stream, false);
  return run(shape, args, &launcher);
}

Status load_attention(const AttentionShape& shape, int32_t device) {
  int before = 0;
  if (Status s = cuda_status(cudaGetDevice(&before), "cudaGetDevice"); !s.ok()) return s;
  if (Status s = cuda_status(cudaSetDevice(device), "cudaSetDevice"); !s.ok()) return s;
  const Status loaded = load_on_current(shape);
  const Status restored = cuda_status(cudaSetDevice(before), "cudaSetDevice");
  return loaded.ok() ? restored : loaded;
}

}  // namespace ellm::cuda
