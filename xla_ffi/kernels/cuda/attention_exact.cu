#include "kernels/cuda/dispatch.h"

namespace ellm::cuda {

Status run_exact(Element element, const AttentionArgs& args, StreamLauncher* launcher) {
  switch (element) {
    case Element::kBFloat16:
      return launch_exact<BFloat16>(*launcher, args);
    case Element::kFloat16:
      return launch_exact<Float16>(*launcher, args);
    case Element::kFloat32:
      break;
  }
  return launch_exact<Float32>(*launcher, args);
}

}  // namespace ellm::cuda
