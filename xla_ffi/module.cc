// The native library as Python sees it: arguments checked, statuses turned into exceptions, the GIL
// released round driver work.
#include <malloc.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "bindings.h"
#include "ffi/registrations.h"
#include "kernels/cpu/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

NB_MODULE(_native, m) {
  m.doc() = "Virtual tensors, KV slots, memory tiers and CPU kernels.";
  nb::exception<OutOfMemoryError>(m, "OutOfMemory", PyExc_RuntimeError);
  bind_devices(m);
  bind_pool(m);
  bind_kv(m);
  bind_tiers(m);
  bind_int4(m);
  bind_int8(m);
  bind_panels(m);
  bind_cuda_attention(m);
  m.def("ffi_registrations", &ffi_registrations, "FFI target name -> capsule of its handler.");
  m.def("cpu_isa", &cpu_isa, "The instruction set of the kernels in use.");
  m.def(
      "malloc_trim", [] { return unlocked([] { return malloc_trim(0) == 1; }); },
      "Gives unused heap back to the system; True if any went.");
  m.def(
      "malloc_retain",
      [](int64_t bytes) {
        const size_t asked = non_negative("bytes", bytes);
        const int most = static_cast<int>(std::min<size_t>(asked, size_t{32} << 20));
        mallopt(M_MMAP_THRESHOLD, most);
        mallopt(M_TRIM_THRESHOLD, 2 * most);
      },
      "bytes"_a, "Sets how large a piece of heap may be to be kept when it is freed.");
}

}  // namespace ellm
