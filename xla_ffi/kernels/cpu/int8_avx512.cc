#include "kernels/cpu/int8_linear.inl"
#include "kernels/cpu/int8_quantize.inl"

namespace ellm::ELLM_ISA {

const Int8Kernels& int8_table() {
  static const Int8Kernels table = {"avx512", int8_quantize, int8_linear, nullptr};
  return table;
}

}  // namespace ellm::ELLM_ISA
