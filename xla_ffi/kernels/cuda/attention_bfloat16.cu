#include "kernels/cuda/dispatch.h"

namespace ellm::cuda {

Status run_bfloat16(const AttentionArgs& args, StreamLauncher* launcher) {
  return launch_tensor_cores<BFloat16>(*launcher, args);
}

}  // namespace ellm::cuda
