#include "means.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_gather(DType dtype, const GatherArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(gather_kernel, dtype, args, launch);
}

int launch_update(DType dtype, const UpdateArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(update_kernel, dtype, args, launch);
}

int launch_means(DType dtype, const MeansArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(means_kernel, dtype, args, launch);
}

int launch_inertia(const InertiaArgs& args, const Launch& launch) { return launch_kernel(inertia_kernel, args, launch); }

}  // namespace cuda
}  // namespace tokenpool
