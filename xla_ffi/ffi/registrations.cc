#include "ffi/registrations.h"

#include "ffi/handlers.h"

namespace ellm {

namespace {

nanobind::capsule capsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nanobind::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

nanobind::dict ffi_registrations() {
  nanobind::dict registrations;
  registrations["ellm_attention"] = capsule(attention_handler);
  registrations["ellm_heads"] = capsule(heads_handler);
  registrations["ellm_likeliest"] = capsule(likeliest_handler);
  registrations["ellm_linear"] = capsule(linear_handler);
  registrations["ellm_linear_int4"] = capsule(linear_int4_handler);
  registrations["ellm_linear_int8"] = capsule(linear_int8_handler);
  registrations["ellm_pool_threads"] = capsule(pool_threads_handler);
  registrations["ellm_rms_norm"] = capsule(rms_norm_handler);
  registrations["ellm_silu_mul"] = capsule(silu_mul_handler);
  return registrations;
}

}  // namespace ellm
