#include "stats.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_absmax(DType dtype, const StatsArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(absmax_kernel, dtype, args, launch);
}

int launch_center(DType dtype, const StatsArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(center_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
