#include "vec_probe.h"

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

static void probe_exp(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp(load(x + i)));
}

static void probe_exp2_negative(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp2_negative(load(x + i)));
}

static void probe_exp2_rounded(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(out + i, exp2_negative<Accuracy::kBFloat16>(load(x + i)));
  }
}

static void probe_store_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(x + i));
}

static void probe_tanh(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, tanh(load(x + i)));
}

#define ELLM_TEXT_OF(name) #name
#define ELLM_TEXT(name) ELLM_TEXT_OF(name)

VecProbe vec_probe() {
  return {ELLM_TEXT(ELLM_ISA), probe_exp, probe_exp2_negative, probe_exp2_rounded, probe_tanh,
          probe_store_bf16,    to_bf16};
}

}  // namespace ellm::ELLM_ISA
