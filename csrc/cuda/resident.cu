// Launcher of the path "resident".
#include "resident.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_resident(DType dtype, const ResidentArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(resident_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
