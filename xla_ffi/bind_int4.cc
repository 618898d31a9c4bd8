// Python's way to the int4 kernels: weights are quantised and packed when they are loaded.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>

#include "bindings.h"
#include "kernels/cpu/int4_kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

namespace {

template <class T>
using Rows = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The weights whose steps `values` holds.
Int4Weights weights_of(size_t n, size_t k, const Values& values) {
  Int4Weights w = {};
  w.group = static_cast<int64_t>(values.shape(2) / 8);
  w.n = static_cast<int64_t>(n);
  w.k = static_cast<int64_t>(k);
  if (values.shape(2) % 8 != 0 || !int4_group_fits(w.group) ||
      static_cast<int64_t>(values.shape(0)) != w.panels() ||
      static_cast<int64_t>(values.shape(1)) != w.groups()) {
    throw nb::value_error("rows [N, K] and values [N/16, K/group, 8 group] do not fit");
  }
  return w;
}

template <class Body>
void for_panels(const Int4Weights& w, uint8_t* values, const Body& body) {
  for (int64_t panel = 0; panel < w.panels(); ++panel) {
    const int64_t first = panel * kInt4Columns;
    body(panel, first, std::min(kInt4Columns, w.n - first),
         values + panel * w.groups() * 8 * w.group);
  }
}

template <class T>
void quantize(const Rows<T>& x, const Values& values, const Scales& scales) {
  const Int4Weights w = weights_of(x.shape(0), x.shape(1), values);
  if (scales.shape(0) != values.shape(0) || scales.shape(1) != values.shape(1) ||
      static_cast<int64_t>(scales.shape(2)) != kInt4Columns) {
    throw nb::value_error("scales have to be [N/16, K/group, 16]");
  }
  const ElementType type = sizeof(T) == 4 ? ElementType::kFloat32 : ElementType::kBFloat16;
  unlocked([&] {
    for_panels(w, values.data(), [&](int64_t panel, int64_t first, int64_t rows, uint8_t* to) {
      int4_kernels().quantize(x.data() + first * w.k, type, rows, w.k, w.group, to,
                              scales.data() + panel * w.groups() * kInt4Columns);
    });
  });
}

void pack(const Rows<uint8_t>& steps, const Values& values) {
  const Int4Weights w = weights_of(steps.shape(0), steps.shape(1), values);
  unlocked([&] {
    for_panels(w, values.data(), [&](int64_t, int64_t first, int64_t rows, uint8_t* to) {
      int4_pack(steps.data() + first * w.k, rows, w.k, w.group, kInt4Zero, to);
    });
  });
}

}  // namespace

void bind_int4(nb::module_& m) {
  const char* doc =
      "Rows of float32, or of bfloat16 as uint16, to steps of four bits and float16 scales.";
  m.def("quantize_int4", &quantize<float>, "x"_a.noconvert(), "values"_a.noconvert(),
        "scales"_a.noconvert(), doc);
  m.def("quantize_int4", &quantize<uint16_t>, "x"_a.noconvert(), "values"_a.noconvert(),
        "scales"_a.noconvert(), doc);
  m.def("pack_int4", &pack, "steps"_a.noconvert(), "values"_a.noconvert(),
        "Rows of steps, 0 to 15, to where the int4 kernels read them.");
}

}  // namespace ellm
