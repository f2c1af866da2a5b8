// Launchers of the path "spread", without its last kernel, the means.
#include "spread.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_token_mean(const TokenMeanArgs& args, const Launch& launch) {
  return launch_kernel(token_mean_kernel, args, launch);
}

int launch_spread_gram(DType dtype, const SpreadGramArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(spread_gram_kernel, dtype, args, launch);
}

int launch_spread(DType dtype, const SpreadArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(spread_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
