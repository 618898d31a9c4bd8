// The columns of a linear layer's result that a unit of work computes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/ranges.h"

namespace ellm {

// Units of `width` columns out of n.
inline Columns unit_columns(const RangeUnit& unit, int64_t width, int64_t n) {
  const auto column = [&](int64_t index) { return std::min(n, index * width); };
  return {column(unit.index), column(unit.index + 1), column(unit.next + 1), unit.goes_on};
}

}  // namespace ellm
