#include "gram.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_gram(DType dtype, const GramArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(gram_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
