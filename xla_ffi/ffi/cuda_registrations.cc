#include <nanobind/stl/string.h>

#include <string>

#include "bindings.h"
#include "ffi/registrations.h"
#include "kernels/cuda/workspace.h"

#if defined(ELLM_CUDA)
#include "ffi/cuda_handlers.h"
#include "kernels/cuda/attention.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

namespace {

nb::dict cuda_ffi_registrations() {
  nb::dict registrations;
#if defined(ELLM_CUDA)
  registrations["ellm_attention_cuda"] =
      nb::capsule(reinterpret_cast<void*>(cuda_attention_handler));
#endif
  return registrations;
}

cuda::AttentionShape shape_of(const std::string& dtype, int64_t rows, int64_t sequences,
                              int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                              int64_t max_tokens) {
  cuda::AttentionShape shape = {
      cuda::Element::kFloat32, rows, sequences, q_heads, kv_heads, head_dim, max_tokens};
  if (dtype == "bfloat16") {
    shape.element = cuda::Element::kBFloat16;
  } else if (dtype == "float16") {
    shape.element = cuda::Element::kFloat16;
  } else if (dtype != "float32") {
    const std::string message =
        "the dtype is " + dtype + "; attention takes float32, bfloat16 and float16";
    throw nb::value_error(message.c_str());
  }
  if (rows < 1 || sequences < 1 || kv_heads < 1 || head_dim < 1 || max_tokens < 1 ||
      q_heads % kv_heads != 0 || q_heads < kv_heads) {
    throw nb::value_error("sizes have to be at least 1, and q_heads a multiple of kv_heads");
  }
  return shape;
}

Status load_kernels(const cuda::AttentionShape& shape, int32_t device) {
#if defined(ELLM_CUDA)
  return cuda::load_attention(shape, device);
#else
  return Status(Code::kDriver,
                "there are no CUDA kernels in this build; build it where nvcc is, or with "
                "-DELLM_CUDA=ON to be told why not");
#endif
}

}  // namespace

void bind_cuda_attention(nb::module_& m) {
  m.def("cuda_ffi_registrations", &cuda_ffi_registrations,
        "FFI target name -> capsule of its handler on CUDA; empty in a build without CUDA.");
  m.def(
      "cuda_attention_workspace_bytes",
      [](const std::string& dtype, int64_t rows, int64_t sequences, int64_t q_heads,
         int64_t kv_heads, int64_t head_dim, int64_t max_tokens) {
        const auto shape =
            shape_of(dtype, rows, sequences, q_heads, kv_heads, head_dim, max_tokens);
        return cuda::Workspace(shape, nullptr).bytes;
      },
      "dtype"_a, "rows"_a, "sequences"_a, "q_heads"_a, "kv_heads"_a, "head_dim"_a, "max_tokens"_a,
      "Bytes of the workspace of an attention call on CUDA.");
  m.def(
      "load_cuda_attention",
      [](int32_t device, const std::string& dtype, int64_t rows, int64_t sequences, int64_t q_heads,
         int64_t kv_heads, int64_t head_dim, int64_t max_tokens) {
        const auto shape =
            shape_of(dtype, rows, sequences, q_heads, kv_heads, head_dim, max_tokens);
        raise_if_failed(unlocked([&] { return load_kernels(shape, device); }));
      },
      "device"_a, "dtype"_a, "rows"_a, "sequences"_a, "q_heads"_a, "kv_heads"_a, "head_dim"_a,
      "max_tokens"_a, "Makes the kernels of such calls ready on a device.");
}

}  // namespace ellm
