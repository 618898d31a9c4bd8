#include "kernels/cpu/int4_linear.inl"
#include "kernels/cpu/int4_quantize.inl"

namespace ellm::ELLM_ISA {

const Int4Kernels& int4_table() {
  static const Int4Kernels table = {"generic", int4_quantize, int4_linear};
  return table;
}

}  // namespace ellm::ELLM_ISA
