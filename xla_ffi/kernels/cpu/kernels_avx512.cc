#include "kernels/cpu/attention.inl"
#include "kernels/cpu/linear.inl"
#include "kernels/cpu/norm.inl"

namespace ellm::ELLM_ISA {

const Kernels& table() {
  static const Kernels table = {"avx512", kLanes, to_float,   linear,   attend_scratch_floats,
                                attend,   merge,  acc_stride, rms_norm, silu_mul};
  return table;
}

}  // namespace ellm::ELLM_ISA
