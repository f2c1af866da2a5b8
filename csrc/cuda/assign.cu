#include "assign.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_assign(DType dtype, const AssignArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(assign_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
