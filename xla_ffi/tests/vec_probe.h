// The element functions of vec.h, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace ellm {

struct VecProbe {
  const char* isa;
  void (*exp)(const float* x, int64_t count, float* out);  // count: a multiple of 16
  void (*exp2_negative)(const float* x, int64_t count, float* out);
  void (*exp2_rounded)(const float* x, int64_t count, float* out);  // good enough for bfloat16
  void (*tanh)(const float* x, int64_t count, float* out);
  void (*store_bf16)(const float* x, int64_t count, uint16_t* out);
  uint16_t (*to_bf16)(float x);
};

}  // namespace ellm
