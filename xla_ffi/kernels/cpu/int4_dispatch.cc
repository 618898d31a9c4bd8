// Picks the int4 kernels for the CPU that runs, and packs what they read.
#include <cstring>

#include "kernels/cpu/int4_kernels.h"

namespace ellm {

namespace generic {
const Int4Kernels& int4_table();
}
#ifdef ELLM_X86
namespace avx2 {
const Int4Kernels& int4_table();
}
namespace avx512 {
const Int4Kernels& int4_table();
}
namespace avx512_vnni {
const Int4Kernels& int4_table();
}
#endif

const Int4Kernels* int4_kernels_for(const char* isa) {
  // They ask of a processor what the int8 kernels of the same name do.
  if (int8_kernels_for(isa) == nullptr) return nullptr;
#ifdef ELLM_X86
  if (std::strcmp(isa, "avx512_vnni") == 0) return &avx512_vnni::int4_table();
  if (std::strcmp(isa, "avx512") == 0) return &avx512::int4_table();
  if (std::strcmp(isa, "avx2") == 0) return &avx2::int4_table();
#endif
  return std::strcmp(isa, "generic") == 0 ? &generic::int4_table() : nullptr;
}

const Int4Kernels& int4_kernels() {
  static const Int4Kernels& best = []() -> const Int4Kernels& {
    for (const char* isa : {"avx512_vnni", "avx512", "avx2"}) {
      if (const Int4Kernels* found = int4_kernels_for(isa)) return *found;
    }
    return generic::int4_table();
  }();
  return best;
}

void int4_pack(const uint8_t* steps, int64_t rows, int64_t k, int64_t group, uint8_t fill,
               uint8_t* values) {
  const int64_t inputs = (k + group - 1) / group * group;
  std::memset(values, fill * 0x11, inputs * kInt4Columns / 2);
  for (int64_t c = 0; c < rows; ++c) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t byte = i / 8 * 4 * kInt4Columns + 4 * c + i % 4;
      const int shift = i % 8 < 4 ? 0 : 4;
      values[byte] =
          static_cast<uint8_t>((values[byte] & (0xf0 >> shift)) | (steps[c * k + i] & 15) << shift);
    }
  }
}

}  // namespace ellm
