#include "kernels/cuda/dispatch.h"

namespace ellm::cuda {

Status run_float16(const AttentionArgs& args, StreamLauncher* launcher) {
  return launch_tensor_cores<Float16>(*launcher, args);
}

}  // namespace ellm::cuda
