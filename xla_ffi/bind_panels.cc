// Python's way to put weights into panels, when they are loaded.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.h"
#include "kernels/cpu/panels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

namespace {

using Rows = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void pack(const Rows& rows, int64_t first, const Panels& panels) {
  const auto count = static_cast<int64_t>(rows.shape(0)), k = static_cast<int64_t>(rows.shape(1));
  const auto n = static_cast<int64_t>(panels.shape(0));
  if (static_cast<int64_t>(panels.shape(1)) != k || k % 2 != 0 || first < 0 || first > n - count) {
    throw nb::value_error(
        "rows [R, K], K even, and panels [N, K] do not fit, first + R being N at most");
  }
  unlocked([&] { pack_panels(rows.data(), first, count, n, k, panels.data()); });
}

}  // namespace

void bind_panels(nb::module_& m) {
  m.def("pack_panels", &pack, "rows"_a.noconvert(), "first"_a, "panels"_a.noconvert(),
        "Puts rows of a matrix of bfloat16, as uint16, into its panels.");
}

}  // namespace ellm
