#include "iterate.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_iterate(const IterateArgs& args, const Launch& launch) { return launch_kernel(iterate_kernel, args, launch); }

}  // namespace cuda
}  // namespace tokenpool
