#include "kernels/cpu/dispatch.h"

#include <cstring>
#include <initializer_list>

namespace ellm {

namespace generic {
const Kernels& table();
}
#ifdef ELLM_X86
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512_bf16 {
const Kernels& table();
}
#endif

#ifdef ELLM_X86
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels* kernels_for(const char* isa) {
#ifdef ELLM_X86
  if (std::strcmp(isa, "avx512_bf16") == 0) {
    const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16") &&
                     __builtin_cpu_supports("avx512vnni");  // no processor has but the first
    return has ? &avx512_bf16::table() : nullptr;
  }
  if (std::strcmp(isa, "avx512") == 0) return has_avx512() ? &avx512::table() : nullptr;
  if (std::strcmp(isa, "avx2") == 0) {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has ? &avx2::table() : nullptr;
  }
#endif
  return std::strcmp(isa, "generic") == 0 ? &generic::table() : nullptr;
}

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
    for (const char* isa : {"avx512_bf16", "avx512", "avx2"}) {
      if (const Kernels* found = kernels_for(isa)) return *found;
    }
    return generic::table();
  }();
  return best;
}

const char* cpu_isa() { return kernels().isa; }

}  // namespace ellm
