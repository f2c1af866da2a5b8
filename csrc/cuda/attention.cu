#include "attention.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_lse(DType dtype, const AttentionArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(lse_kernel, dtype, args, launch);
}

int launch_received(DType dtype, const AttentionArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(received_kernel, dtype, args, launch);
}

int launch_reduce(const AttentionArgs& args, const Launch& launch) { return launch_kernel(reduce_kernel, args, launch); }

}  // namespace cuda
}  // namespace tokenpool
