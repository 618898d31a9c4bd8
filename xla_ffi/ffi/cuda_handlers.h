// The FFI handlers of builds with CUDA.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace ellm {

extern "C" XLA_FFI_Error* cuda_attention_handler(XLA_FFI_CallFrame* call_frame);

}  // namespace ellm
