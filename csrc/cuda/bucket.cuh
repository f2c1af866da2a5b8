// One block per image: after an assignment, repair empty clusters, decide whether the image has converged, and list
// the members of every cluster. Also used by pool and by unpool's backward, which bucket a given assignment.
#pragma once

#include "args_streaming.h"
#include "members.cuh"

namespace tokenpool {
namespace cuda {

__global__ void __launch_bounds__(1024, 1) bucket_kernel(BucketArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.shape.tokens, k = a.shape.clusters;
  for (int64_t b = blockIdx.x; b < a.shape.batch; b += gridDim.x) {
    int* words = a.scratch == nullptr ? reinterpret_cast<int*>(memory)
                                      : a.scratch + b * ((a.bucket_warps + 1) * static_cast<int64_t>(k) + 1);
    int* start = words;  // k + 1, after the counts of the repair have used it
    int* base = words + k + 1;
    int* order = a.order + b * n;
    int clusters = k;
    if (a.given != nullptr) {
      bucket_tokens(a.given + b * n, n, k, a.bucket_warps, base, start, order);
    } else {
      if (a.done[b]) continue;  // the same for the whole block
      clusters = a.stats[b].clusters;
      int* label = a.label + b * n;
      int* previous = a.previous + b * n;
      count_members(label, n, clusters, start);
      float* cost = a.cost + b * n;
      const bool repaired = repair_empty(label, cost, n, clusters, start, scratch);
      int changed = a.iteration == 0;
      Sum sum;
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        changed |= label[i] != previous[i];
        sum.add(cost[i]);
      }
      const float loss = block_sum(sum.value, scratch), before = a.loss[b];
      const bool go_on = __syncthreads_or(changed) && !gains_nothing(a.iteration, repaired, loss, before);
      if (threadIdx.x == 0) a.loss[b] = loss;
      if (!go_on) {  // the lists are still those of the iteration before
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += blockDim.x) label[i] = previous[i];
        if (threadIdx.x == 0) a.done[b] = 1;
        __syncthreads();
        continue;
      }
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += blockDim.x) previous[i] = label[i];
      bucket_tokens(label, n, clusters, a.bucket_warps, base, start, order);
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      a.segment_start[b * k + j] = j < clusters ? start[j] : 0;
      a.segment_length[b * k + j] = j < clusters ? start[j + 1] - start[j] : 0;
    }
    __syncthreads();
  }
}

// One block per image: the streaming path's results in the order asked for. With `sort`, clusters are ranked by
// their first member, so the segments and medoids are permuted (through scratch).
__global__ void __launch_bounds__(1024, 1) finish_kernel(FinishArgs a) {
  const int n = a.shape.tokens, k = a.shape.clusters;
  for (int64_t b = blockIdx.x; b < a.shape.batch; b += gridDim.x) {
    const int clusters = a.stats[b].clusters;
    int* rank = a.scratch + b * 3 * k;
    int* start = rank + k;
    int* length = start + k;
#pragma unroll 1
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      start[j] = a.segment_start[b * k + j];
      length[j] = a.segment_length[b * k + j];
    }
    __syncthreads();
    rank_clusters(a.order + b * n, start, clusters, a.sort != 0, rank);
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int j = a.label[b * n + i];
      a.assignment[b * n + i] = j < 0 ? -1 : rank[j];
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      const int row = j < clusters ? rank[j] : j;
      a.segment_start[b * k + row] = start[j];
      a.segment_length[b * k + row] = length[j];
      if (a.medoids != nullptr) a.medoids[b * k + row] = j < clusters ? a.medoid[b * k + j] : -1;
    }
    if (threadIdx.x == 0) a.arrived[b] = 0;
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
