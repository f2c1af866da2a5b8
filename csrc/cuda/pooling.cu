// Launchers of unpool, the gradient of pool, and attention received.
#include "attention.cuh"
#include "pool_ops.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_unpool(DType dtype, const UnpoolArgs& args, const Launch& launch) {
  return element_size(dtype) == 2 ? launch_kernel(unpool_kernel<uint16_t>, args, launch)
                                  : launch_kernel(unpool_kernel<uint32_t>, args, launch);
}

int launch_count(const CountArgs& args, const Launch& launch) {
  return launch_kernel(count_kernel, args, launch);
}

int launch_pool_backward(DType dtype, const PoolBackwardArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(pool_backward_kernel, dtype, args, launch);
}

int launch_lse(DType dtype, const AttentionArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(lse_kernel, dtype, args, launch);
}

int launch_received(DType dtype, const AttentionArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(received_kernel, dtype, args, launch);
}

int launch_reduce(const AttentionArgs& args, const Launch& launch) {
  return launch_kernel(reduce_kernel, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
