// XLA's element types as the kernels know them.
#pragma once

#include "kernels/cpu/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

// False where it is neither float32 nor bfloat16.
inline bool to_element_type(xla::ffi::DataType type, ElementType* out) {
  if (type != xla::ffi::DataType::F32 && type != xla::ffi::DataType::BF16) return false;
  *out = type == xla::ffi::DataType::F32 ? ElementType::kFloat32 : ElementType::kBFloat16;
  return true;
}

}  // namespace ellm
