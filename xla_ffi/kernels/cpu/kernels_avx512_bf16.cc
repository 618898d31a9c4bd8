#include "kernels/cpu/table.inl"

namespace ellm::ELLM_ISA {

const Kernels& table() {
  static const Kernels table = make_table("avx512_bf16");
  return table;
}

}  // namespace ellm::ELLM_ISA
