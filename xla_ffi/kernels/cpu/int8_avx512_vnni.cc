#include "kernels/cpu/int8_panels.inl"
#include "kernels/cpu/int8_quantize.inl"

namespace ellm::ELLM_ISA {

const Int8Kernels& int8_table() {
  static const Int8Kernels table = {"avx512_vnni", int8_quantize, int8_linear, int8_linear_panels};
  return table;
}

}  // namespace ellm::ELLM_ISA
