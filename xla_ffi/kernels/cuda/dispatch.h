// The element types are compiled one by one.
#pragma once

#include "kernels/cuda/launcher.h"

namespace ellm::cuda {

Status run_bfloat16(const AttentionArgs& args, StreamLauncher* launcher);
Status run_float16(const AttentionArgs& args, StreamLauncher* launcher);
Status run_exact(Element element, const AttentionArgs& args, StreamLauncher* launcher);

}  // namespace ellm::cuda
