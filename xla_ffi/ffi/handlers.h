// The FFI handlers of the library.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace ellm {

extern "C" XLA_FFI_Error* attention_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* heads_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* likeliest_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* linear_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* linear_int4_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* linear_int8_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* pool_threads_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* rms_norm_handler(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* silu_mul_handler(XLA_FFI_CallFrame* call_frame);

}  // namespace ellm
