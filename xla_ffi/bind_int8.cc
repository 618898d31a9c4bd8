// Python's way to the int8 kernels: weights are quantised when they are loaded.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings.h"
#include "kernels/cpu/int8_kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ellm {

namespace {

template <class T>
using Rows = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
void quantize(const Rows<T>& x, const Values& values, const Scales& scales) {
  const size_t rows = x.shape(0), k = x.shape(1);
  if (values.shape(0) != rows || values.shape(1) != k || scales.shape(0) != rows) {
    throw nb::value_error("x [N, K], values [N, K] and scales [N] do not fit");
  }
  const ElementType type = sizeof(T) == 4 ? ElementType::kFloat32 : ElementType::kBFloat16;
  const Int8Rows to = {values.data(), static_cast<int64_t>(k), scales.data(), nullptr};
  unlocked([&] { int8_kernels().quantize(x.data(), type, rows, k, to); });
}

}  // namespace

void bind_int8(nb::module_& m) {
  const char* doc =
      "Rows of float32, or of bfloat16 as uint16, to int8 values and a float32 scale per row.";
  m.def("quantize_int8", &quantize<float>, "x"_a.noconvert(), "values"_a.noconvert(),
        "scales"_a.noconvert(), doc);
  m.def("quantize_int8", &quantize<uint16_t>, "x"_a.noconvert(), "values"_a.noconvert(),
        "scales"_a.noconvert(), doc);
  m.def(
      "int8_isa", [] { return int8_kernels().isa; },
      "The instruction set of the int8 and int4 kernels in use.");
}

}  // namespace ellm
