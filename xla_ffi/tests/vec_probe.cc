#include "vec_probe.h"

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

static void probe_exp(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp(load(x + i)));
}

static void probe_tanh(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, tanh(load(x + i)));
}

#define ELLM_TEXT_OF(name) #name
#define ELLM_TEXT(name) ELLM_TEXT_OF(name)

VecProbe vec_probe() { return {ELLM_TEXT(ELLM_ISA), probe_exp, probe_tanh, to_bf16}; }

}  // namespace ellm::ELLM_ISA
