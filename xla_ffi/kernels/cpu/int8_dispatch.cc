// Picks the int8 kernels for the CPU that runs.
#include <cstring>
#include <initializer_list>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/int8_kernels.h"

namespace ellm {

namespace generic {
const Int8Kernels& int8_table();
}
#ifdef ELLM_X86
namespace avx2 {
const Int8Kernels& int8_table();
}
namespace avx512 {
const Int8Kernels& int8_table();
}
namespace avx512_vnni {
const Int8Kernels& int8_table();
}
#endif

const Int8Kernels* int8_kernels_for(const char* isa) {
#ifdef ELLM_X86
  // A processor that runs the bfloat16 or float32 kernels of a name runs the int8 ones too.
  if (std::strcmp(isa, "avx512_vnni") == 0) {
    const bool has = kernels_for("avx512") != nullptr && __builtin_cpu_supports("avx512vnni");
    return has ? &avx512_vnni::int8_table() : nullptr;
  }
  if (std::strcmp(isa, "avx512") == 0) {
    return kernels_for("avx512") != nullptr ? &avx512::int8_table() : nullptr;
  }
  if (std::strcmp(isa, "avx2") == 0) {
    return kernels_for("avx2") != nullptr ? &avx2::int8_table() : nullptr;
  }
#endif
  return std::strcmp(isa, "generic") == 0 ? &generic::int8_table() : nullptr;
}

const Int8Kernels& int8_kernels() {
  static const Int8Kernels& best = []() -> const Int8Kernels& {
    for (const char* isa : {"avx512_vnni", "avx512", "avx2"}) {
      if (const Int8Kernels* found = int8_kernels_for(isa)) return *found;
    }
    return generic::int8_table();
  }();
  return best;
}

}  // namespace ellm
