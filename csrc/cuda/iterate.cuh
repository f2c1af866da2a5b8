// One block per image runs all iterations from the Gram matrix in global memory (path "gram").
#pragma once

#include "cluster.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kIterateColumns = 2;  // columns of G that a thread adds at a time

__global__ void __launch_bounds__(1024, 1) iterate_kernel(IterateArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.shape.tokens, k = a.shape.clusters;
  float* weight = reinterpret_cast<float*>(memory);
  ClusterState s(weight, weight + round_up(n, 4), n, k);
  for (int64_t b = blockIdx.x; b < a.shape.batch; b += gridDim.x) {
    const ImageStats stats = a.stats[b];
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x)
      weight[i] = is_valid(a.mask, b * n + i) ? normal_weight(a.weights, b * n + i, stats.weight_scale) : -1.0f;
    ClusterProblem p;
    p.tokens = n;
    p.clusters = stats.clusters;
    p.iterations = a.iterations;
    p.bucket_warps = a.bucket_warps;
    p.with_medoids = a.medoids != nullptr;
    p.sort = a.sort != 0;
    p.init = a.init == nullptr ? nullptr : a.init + b * k;
    p.first_label = a.init == nullptr ? a.first_label + b * n : nullptr;
    p.first_cost = a.init == nullptr ? a.first_cost + b * n : nullptr;
    __syncthreads();
    const FullGram gram = {a.gram + b * n * a.ld, a.ld};
    cluster_from_gram<kIterateColumns>(gram, s, p, scratch);
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int j = s.label[i];
      a.assignment[b * n + i] = j < 0 ? -1 : s.rank[j];
      a.order[b * n + i] = s.order[i];
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      const bool used = j < stats.clusters;
      const int row = used ? s.rank[j] : j;
      a.segment_start[b * k + row] = used ? s.start[j] : 0;
      a.segment_length[b * k + row] = used ? s.start[j + 1] - s.start[j] : 0;
      if (a.medoids != nullptr) a.medoids[b * k + row] = used ? s.medoid[j] : -1;
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
