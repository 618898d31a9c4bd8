// Picks the kernels for the CPU that runs.
#pragma once

#include "kernels/cpu/kernels.h"

namespace ellm {

// The best table this CPU can run.
const Kernels& kernels();

// The table named `isa` ("avx512_bf16", "avx512", "avx2", "generic"), or null where the CPU or the
// build lacks it.
const Kernels* kernels_for(const char* isa);

// Name of the table that kernels() returns.
const char* cpu_isa();

}  // namespace ellm
