// All kernels of one instruction set.
#include "kernels/cpu/attention.inl"
#include "kernels/cpu/heads.inl"
#include "kernels/cpu/likeliest.inl"
#include "kernels/cpu/linear.inl"
#include "kernels/cpu/panels.inl"

namespace ellm::ELLM_ISA {

static Kernels make_table(const char* isa) {
  return {isa,    kLanes, kHasPairs,  to_float, linear, linear_panels, attend_scratch_floats,
          attend, merge,  acc_stride, rms_norm, heads,  silu_mul,      likeliest};
}

}  // namespace ellm::ELLM_ISA
