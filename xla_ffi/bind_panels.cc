// Python's way to put weights into panels, when they are loaded.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.h"
#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/panels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

namespace {

using Words = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_panels(nb::module_& m) {
  m.def(
      "pack_panels",
      [](const Words& matrix, bool by_turns) {
        const auto n = static_cast<int64_t>(matrix.shape(0));
        const auto words = static_cast<int64_t>(matrix.shape(1));
        if (by_turns && n % kPanelOutputs != 0) {
          throw nb::value_error("gates and ups by turns take a multiple of a panel's outputs");
        }
        unlocked([&] {
          if (by_turns) alternate_halves(matrix.data(), n, words * kWordBytes);
          pack_panels(matrix.data(), n, words);
        });
      },
      "matrix"_a.noconvert(), "by_turns"_a = false, "Puts a matrix into panels, in its place.");
  m.def(
      "int8_panels", [] { return int8_kernels().linear_panels != nullptr; },
      "Whether int8 weights are multiplied in panels here.");
}

}  // namespace ellm
