// Which kernels an attention call launches, in order. The launcher is a parameter, so that the
// tests run the very same sequence on the CPU.
#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/exact.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/prefill_hopper.h"
#include "kernels/cuda/prepare.h"

namespace ellm::cuda {

struct LaunchShape {
  int64_t blocks;
  int32_t threads;
  int64_t shared_bytes;
  // Blocks take units of work until none is left, so no more are needed than run at the same time.
  bool persistent = false;
};

// Launchers have
//   template <auto kKernel> Status launch(const LaunchShape&, const AttentionArgs&);
//   bool has_warpgroup_products() const;  // compute capability 9.0

template <class Launcher>
Status launch_prepare(Launcher& launcher, const AttentionArgs& args) {
  const LaunchShape shape = {prepare_blocks(args.rows), kPrepareThreads, kPrepareSharedBytes};
  if (args.kv.row_bytes % int64_t{sizeof(Bytes16)} == 0) {
    return launcher.template launch<prepare<Bytes16>>(shape, args);
  }
  if (args.kv.row_bytes % int64_t{sizeof(uint32_t)} == 0) {
    return launcher.template launch<prepare<uint32_t>>(shape, args);
  }
  return launcher.template launch<prepare<uint16_t>>(shape, args);
}

template <class E, class Launcher>
Status launch_exact(Launcher& launcher, const AttentionArgs& args) {
  if (Status s = launch_prepare(launcher, args); !s.ok()) return s;
  return launcher.template launch<exact<E>>(
      {exact_blocks(args.rows, args.q_heads), kExactThreads, kExactSharedBytes}, args);
}

template <class E, int32_t kHeadDim, class Launcher>
Status launch_prefill(Launcher& launcher, const AttentionArgs& args) {
  const int64_t units = int64_t{args.workspace.prefill_capacity} * args.kv.kv_heads;
  if constexpr (kHeadDim <= 128) {
    constexpr int32_t kWidth = static_cast<int32_t>(round_up(kHeadDim, kSwizzledColumns));
    if (launcher.has_warpgroup_products()) {
      return launcher.template launch<prefill_hopper<E, kWidth>>(
          {units, kHopperThreads, HopperMemory<kWidth>::kBytes, true}, args);
    }
  }
  using Memory = PrefillMemory<kHeadDim>;
  return launcher.template launch<prefill<E, kHeadDim>>(
      {units, Memory::kThreads, Memory::kBytes, true}, args);
}

template <class E, int32_t kHeadDim, class Launcher>
Status launch_decode(Launcher& launcher, const AttentionArgs& args) {
  const Workspace& space = args.workspace;
  const int64_t units = int64_t{space.row_capacity} * space.parts_capacity * args.kv.kv_heads *
                        head_blocks(args.group.value());
  return launcher.template launch<decode<E, kHeadDim>>(
      {units, kDecodeThreads, DecodeMemory<kHeadDim>::kBytes, true}, args);
}

template <class E, int32_t kHeadDim, class Launcher>
Status launch_head_dim(Launcher& launcher, const AttentionArgs& args) {
  if (Status s = launch_prepare(launcher, args); !s.ok()) return s;
  if (Status s = launch_decode<E, kHeadDim>(launcher, args); !s.ok()) return s;
  return args.workspace.decodes_only() ? Status::Ok() : launch_prefill<E, kHeadDim>(launcher, args);
}

template <class E, class Launcher>
Status launch_tensor_cores(Launcher& launcher, const AttentionArgs& args) {
  if (args.head_dim <= 64) return launch_head_dim<E, 64>(launcher, args);
  if (args.head_dim <= 96) return launch_head_dim<E, 96>(launcher, args);
  if (args.head_dim <= 128) return launch_head_dim<E, 128>(launcher, args);
  return launch_head_dim<E, 256>(launcher, args);
}

}  // namespace ellm::cuda
