#include "kernels/cpu/table.inl"

namespace ellm::ELLM_ISA {

const Kernels& table() {
  static const Kernels table = make_table("generic");
  return table;
}

}  // namespace ellm::ELLM_ISA
