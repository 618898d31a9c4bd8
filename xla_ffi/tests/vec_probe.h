// The element functions of vec.h, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace ellm {

struct VecProbe {
  const char* isa;
  void (*exp)(const float* x, int64_t count, float* out);  // count: a multiple of 16
  void (*tanh)(const float* x, int64_t count, float* out);
  uint16_t (*to_bf16)(float x);
};

}  // namespace ellm
