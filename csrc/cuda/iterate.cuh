// One block per image runs all iterations from the Gram matrix in global memory (path "gram").
#pragma once

#include "cluster.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kIterateColumns = 2;  // columns of G that a thread adds at a time

template <typename T>
__global__ void __launch_bounds__(1024, 1) iterate_kernel(IterateArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.run.shape.tokens, k = a.run.shape.clusters;
  float* weight = reinterpret_cast<float*>(memory);
  ClusterState s(weight, weight + round_up(n, 4), n, k);
  for (int64_t b = blockIdx.x; b < a.run.shape.batch; b += gridDim.x) {
    const ImageStats stats = a.stats[b];
    load_weights(a.run, b, stats.weight_scale, weight);
    __syncthreads();
    const FullGram gram = {a.gram + b * n * a.ld, static_cast<int>(a.ld)};
    const ClusterProblem p = problem_of(a.run, b, stats);
    while (!cluster_from_gram<kIterateColumns, true>(gram, s, p, scratch))
      fill_with_distances(gram, Image<T>(a.x, b), n, a.run.shape.features, stats.scale);
    write_assignment(a.run, b, s);
    write_lists(a.run, a.lists, b, stats.clusters, s);
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
