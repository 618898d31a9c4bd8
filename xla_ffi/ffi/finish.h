// What a linear layer is asked to do with its products, read from the operands of a call.
#pragma once

#include <string>
#include <tuple>

#include "ffi/element_type.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/panels.h"
#include "xla/ffi/api/ffi.h"

namespace ellm {

// Of a result of `rows` rows and n columns, before they are gated: bias is [n], add [rows, n], and
// what has no elements is not there. Returns what is wrong, or nothing.
inline std::string read_finish(const xla::ffi::AnyBuffer& bias, const xla::ffi::AnyBuffer& add,
                               bool gated, int64_t rows, int64_t n, bool panels,
                               ElementType out_type, Finish* finish) {
  const auto bits = [](const xla::ffi::AnyBuffer& buffer) {
    return static_cast<const uint16_t*>(buffer.untyped_data());
  };
  const bool biased = bias.element_count() != 0;
  const bool added = add.element_count() != 0;
  if (!biased && !added && !gated) return "";
  if (!panels || out_type != ElementType::kBFloat16) {
    return "a bias, something to add and gates take weights in panels and a result in bfloat16";
  }
  for (const auto& [buffer, there, count] :
       {std::tuple{&bias, biased, n}, std::tuple{&add, added, rows * n}}) {
    ElementType type;
    if (there && (!to_element_type(buffer->element_type(), &type) || type != out_type ||
                  static_cast<int64_t>(buffer->element_count()) != count)) {
      return "bias [N] and what is added, [T, N], have to be bfloat16 of these sizes";
    }
  }
  if (gated && (added || n % kPanelOutputs != 0)) {
    return "gates take a multiple of " + std::to_string(kPanelOutputs) +
           " outputs, and nothing to add";
  }
  if (biased) finish->bias = bits(bias);
  if (added) finish->add = bits(add);
  finish->gated = gated;
  return "";
}

}  // namespace ellm
